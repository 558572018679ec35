"""Ranks that stay: started once for each number of ranks, they take one job of the tests after the other.

To start a process, with torch and what it imports, takes longer than most jobs do. A job that fails ends its ranks, and
the next one gets new ones. Tests of how processes start, fail and end, or of the memory they take, start their own.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.errors import AutoparError, WorkerError
from autopar.runtime.launch import Job, launch_local

POLL_S = 0.02


class Ranks:
    """Some ranks, and the directory through which they get jobs and give results."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._directory = tempfile.TemporaryDirectory(prefix="autopar-ranks-")
        self._numbers = itertools.count()
        self._error: AutoparError | None = None
        self._thread = threading.Thread(target=self._launch, daemon=True)
        self._thread.start()

    @property
    def _path(self) -> Path:
        return Path(self._directory.name)

    def _launch(self) -> None:
        job = Job(f"{__name__}:serve", {"directory": self._directory.name}, self._num_processes)
        try:
            launch_local(job)
        except AutoparError as error:
            self._error = error

    def run(self, entry: str, arguments: Mapping[str, Any], timeout_s: float) -> list[Any]:
        """Results by rank. Raises what the launch raised, or WorkerError after so long."""
        number, deadline = next(self._numbers), time.monotonic() + timeout_s
        _write(self._path / f"job_{number}.json", {"entry": entry, "arguments": arguments})
        results = [self._path / f"result_{number}_{rank}.json" for rank in range(self._num_processes)]
        while not all(path.exists() for path in results):
            if not self._thread.is_alive():
                raise self._error or WorkerError("the ranks have ended")
            if time.monotonic() > deadline:
                raise WorkerError(f"no result of {entry} after {timeout_s:g} s")
            time.sleep(POLL_S)
        return [json.loads(path.read_text()) for path in results]

    def stop(self) -> None:
        """End the ranks, which have nothing to do."""
        (self._path / "stop").touch()
        self._thread.join(60)
        self._directory.cleanup()


@functools.cache
def _ranks(num_processes: int) -> list[Ranks]:
    """Those that stay, at most one group; the newest last."""
    return []


def run_on(num_processes: int, entry: str, arguments: Mapping[str, Any], timeout_s: float = 500.0) -> list[Any]:
    """Results by rank of `package.module:function`, called with the arguments on each of so many ranks."""
    kept = _ranks(num_processes)
    if not kept:
        kept.append(Ranks(num_processes))
    ranks = kept.pop()
    found = ranks.run(entry, arguments, timeout_s)
    kept.append(ranks)  # unless it failed
    return found


def stop_all() -> None:
    """End all ranks."""
    for num_processes in range(1, 9):
        while kept := _ranks(num_processes):
            kept.pop().stop()


def serve(arguments: Mapping[str, Any]) -> None:
    """One rank: do the jobs as they come."""
    directory, rank = Path(arguments["directory"]), dist.get_rank()
    for number in itertools.count():
        path = directory / f"job_{number}.json"
        while not path.exists():
            if (directory / "stop").exists():
                return
            time.sleep(POLL_S)
        job = json.loads(path.read_text())
        torch.manual_seed(0)
        random.seed(0)
        module, _, name = job["entry"].partition(":")
        result = getattr(importlib.import_module(module), name)(job["arguments"])
        _write(directory / f"result_{number}_{rank}.json", result)
        gc.collect()


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
