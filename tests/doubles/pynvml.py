"""Stands for `pynvml` in processes that a test starts with this directory first on PYTHONPATH.

The boards live in the JSON file that FAKE_NVML names; every call reads it, and those that set something write it, under
a lock. Their seconds are so many times faster as FAKE_NVML_SPEED says.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.nvml_double import FakeBoard, FakeNvml, NVMLError

__all__ = ["NVMLError"]


def __getattr__(name: str) -> Callable[..., Any]:
    if not name.startswith("nvml") or not hasattr(FakeNvml(FakeBoard()), name):
        raise AttributeError(name)
    return lambda *arguments: _call(name, arguments)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    path = Path(os.environ["FAKE_NVML"])
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        boards = [FakeBoard(**content) for content in json.loads(path.read_text())]
        speed = float(os.environ.get("FAKE_NVML_SPEED", "1"))
        found = getattr(FakeNvml(*boards, clock=lambda: speed * time.perf_counter()), name)(*arguments)
        if "Set" in name or "Reset" in name:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps([asdict(board) for board in boards]))
            partial.replace(path)
        return found
