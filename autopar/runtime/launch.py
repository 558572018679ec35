"""Local launch: N worker processes on this machine, one per rank, that live and die together.

The parent (which needs no torch) writes the job to a directory, starts `python -m autopar.runtime.worker` N times and
waits. If a worker fails or is killed the others are ended and `WorkerError` names the first to fail; however the
parent leaves, no worker stays behind (each also watches its parent and ends when that is gone).

Files in the directory: `job.json`; by rank `result_R.json`, `error_R.json`, `output_R.txt` and `log_R.txt`
(what it printed); `port` of the rendezvous.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autopar import errors
from autopar.errors import AutoparError, WorkerError

POLL_S = 0.05
"""How often the parent looks at its workers."""
GRACE_S = 3.0
"""How long workers have to end on SIGTERM before SIGKILL."""
SETTLE_S = 0.5
"""After one failure, how long to wait for others that failed at the same time and may know the cause."""
KEEP_MEMORY: Mapping[str, str] = MappingProxyType(
    {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}
)
"""Settings of glibc's allocator, where the user has none: what a step frees stays for the next one. Given back to the
system it is zeroed page by page again, which took a fifth of the step of a small GPT on a processor."""


@dataclass(frozen=True)
class Job:
    """What workers do.

    Attributes:
        entry: `package.module:function`; called with `arguments` once `torch.distributed` is initialised; its JSON
            value is the worker's result.
        arguments: JSON object.
        num_processes: number of ranks.
    """

    entry: str
    arguments: Mapping[str, Any]
    num_processes: int


def launch_local(
    job: Job, *, timeout_s: float | None = None, on_line: Callable[[str], None] | None = None
) -> list[Any]:
    """Run the job and return the results by rank.

    Args:
        job: see `Job`.
        timeout_s: end everything after this long; None: no limit.
        on_line: called with each line that rank 0 prints.

    Raises:
        AutoparError: as raised by a worker, if on purpose; its message names the rank.
        WorkerError: a worker died, raised anything else, or the time is over.
    """
    with tempfile.TemporaryDirectory(prefix="autopar-") as name:
        directory = Path(name)
        (directory / "job.json").write_text(json.dumps({"entry": job.entry, "arguments": dict(job.arguments)}))
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(job.num_processes):
                workers.append(_start(rank, job.num_processes, directory))
            _wait(workers, directory, timeout_s, on_line)
        finally:
            _end(workers)
        return [json.loads((directory / f"result_{rank}.json").read_text()) for rank in range(job.num_processes)]


def _start(rank: int, num_processes: int, directory: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join([p for p in sys.path if p and os.path.isdir(p)]),
    }
    environment = {**KEEP_MEMORY, **environment}
    environment.pop("MASTER_ADDR", None)  # of a launcher above this one, which must not be joined
    with (directory / f"output_{rank}.txt").open("wb") as output, (directory / f"log_{rank}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "autopar.runtime.worker", str(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
        )


def _wait(
    workers: Sequence[subprocess.Popen[bytes]],
    directory: Path,
    timeout_s: float | None,
    on_line: Callable[[str], None] | None,
) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    shown = 0
    while True:
        codes = [worker.poll() for worker in workers]
        shown = _show_lines(directory / "output_0.txt", shown, on_line)
        if any(code not in (None, 0) for code in codes):
            time.sleep(SETTLE_S)
            raise _failure([worker.poll() for worker in workers], directory)
        if all(code == 0 for code in codes):
            _show_lines(directory / "output_0.txt", shown, on_line)
            return
        if deadline is not None and time.monotonic() > deadline:
            running = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise WorkerError(f"no result after {timeout_s:g} s; still running: ranks {running}")
        time.sleep(POLL_S)


def _show_lines(path: Path, shown: int, on_line: Callable[[str], None] | None) -> int:
    """Hand over complete lines after byte `shown`; returns how far they went."""
    if on_line is None:
        return shown
    with path.open("rb") as file:
        file.seek(shown)
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]
    for line in complete.decode(errors="replace").splitlines():
        on_line(line)
    return shown + len(complete)


def _failure(codes: Sequence[int | None], directory: Path) -> AutoparError:
    """The error of the rank that failed first: a killed process before the others that then lost their peer."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            return WorkerError(f"rank {rank} was killed by {signal.Signals(-code).name}")
    found = [(rank, _read_error(directory, rank)) for rank, code in enumerate(codes) if code]
    told = [(error["failed_at"], rank, error) for rank, error in found if error is not None]
    if not told:
        rank = found[0][0]
        return WorkerError(f"rank {rank} ended with exit code {codes[rank]}\n{_tail(directory, rank)}")
    _, rank, error = min(told, key=lambda entry: entry[:2])
    deliberate = getattr(errors, error["type"], None)
    if deliberate is not None and error["type"] not in ("InfeasibleError", "WorkerError"):
        return deliberate(error["message"])  # type: ignore[no-any-return]
    return WorkerError(f"rank {rank} failed: {error['type']}: {error['message']}\n{error['traceback']}")


def _read_error(directory: Path, rank: int) -> dict[str, Any] | None:
    path = directory / f"error_{rank}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _tail(directory: Path, rank: int, num_lines: int = 20) -> str:
    lines = (directory / f"log_{rank}.txt").read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-num_lines:])


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every worker that still runs, and wait until it is gone."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
