"""Stragglers: which rank makes the others wait, seen from how long each works in a step and how long it waits.

A step takes equally long on every rank, since ranks wait for each other. So a thread looks every few milliseconds at
what the rank's main thread is doing, and adds the time to *waiting* if that is a collective, else to *working*. On GPUs
the host does not see who waits, so there nothing is measured.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

PERIOD_S = 0.02
WAITING_IN = ("torch.distributed", "autopar.program.collectives", "autopar.runtime.buckets", "autopar.program.gathered")
"""Modules whose functions, as the innermost Python ones, wait for other ranks."""
SLOW = 1.5
"""A rank that works so many times longer than the median of the others, for what its plan gives it to do, is slow."""
WINDOW_STEPS = 10
WINDOWS = 2
"""So many windows in a row must agree."""


@dataclass(frozen=True)
class Straggler:
    """A slow rank: `factor` over the others; `working_s` of a step, `usual_s` what it would be at the others' speed."""

    rank: int
    factor: float
    working_s: float
    usual_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is {self.factor:.2g} times slower than the others: it works {self.working_s:.3g} s of a "
            f"step, at their speed it would be {self.usual_s:.3g} s (measured)"
        )


def find_straggler(working_s: Sequence[float], expected: Sequence[float]) -> Straggler | None:
    """The slowest rank if it is slow; with two ranks the faster one counts as the others.

    Args:
        working_s: of a step, by rank.
        expected: in any unit, by rank: what the plan gives each to do.
    """
    if len(working_s) < 2 or not all(expected):
        return None
    paces = [seconds / share for seconds, share in zip(working_s, expected, strict=True)]
    rank = max(range(len(paces)), key=lambda r: paces[r])
    usual = statistics.median(pace for r, pace in enumerate(paces) if r != rank)
    if usual <= 0 or paces[rank] < SLOW * usual:
        return None
    return Straggler(rank, paces[rank] / usual, working_s[rank], usual * expected[rank])


class Watch:
    """Counts this rank's working seconds, and compares them with the others' every `WINDOW_STEPS` steps."""

    def __init__(self, expected: Sequence[float], frame: Callable[[], FrameType | None] | None = None) -> None:
        """Start to look; `frame` gives the innermost frame of what is watched: by default of the calling thread."""
        self._expected = expected
        thread = threading.get_ident()
        self._frame = frame or (lambda: sys._current_frames().get(thread))
        self._working_s = 0.0
        self._num_steps = 0
        self._found: list[Straggler | None] = []
        self._is_over = threading.Event()
        threading.Thread(target=self._look, daemon=True, name="watch").start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()

    def after_step(self) -> Straggler | None:
        """Every rank must call, and hears the same: a straggler once enough windows agree on one."""
        self._num_steps += 1
        if self._num_steps % WINDOW_STEPS:
            return None
        own, self._working_s = self._working_s / WINDOW_STEPS, 0.0
        told = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        told[dist.get_rank()] = own
        dist.all_reduce(told)
        self._found = [*self._found, find_straggler(told.tolist(), self._expected)][-WINDOWS:]
        ranks = {found.rank if found else None for found in self._found}
        return self._found[-1] if len(self._found) == WINDOWS and len(ranks) == 1 else None

    def _look(self) -> None:
        last_s = time.perf_counter()
        while not self._is_over.wait(PERIOD_S):
            frame, now_s = self._frame(), time.perf_counter()
            if frame is not None and not is_waiting(frame):
                self._working_s += now_s - last_s
            last_s = now_s


def is_waiting(frame: FrameType) -> bool:
    """The innermost frame belongs to a module that waits for other ranks."""
    module = str(frame.f_globals.get("__name__", ""))
    return any(module == name or module.startswith(f"{name}.") for name in WAITING_IN)
