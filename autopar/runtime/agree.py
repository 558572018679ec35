"""What one rank finds out for all, however long it takes: it shows meanwhile that it lives, and no wait runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
BEAT_S = 0.25
"""Between two signs of life; below the shortest limit of a collective."""


def decided_by_first(decide: Callable[[], T]) -> T:
    """What `decide` returns on the first rank, on every rank; all must call, and the others' `decide` is not called.

    Raises:
        whatever `decide` raises, on the first rank alone.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    if dist.get_rank() != 0:
        heard: T = _hear()
        return heard
    is_over = threading.Event()
    beats = threading.Thread(target=_beat, args=(is_over,), daemon=True, name="deciding")
    beats.start()
    try:
        found = decide()
    finally:
        is_over.set()
        beats.join()
    dist.broadcast_object_list([[found]], src=0)
    return found


def _hear() -> Any:
    told: list[list[Any]] = [[]]
    while not told[0]:
        dist.broadcast_object_list(told, src=0)
    return told[0][0]


def _beat(is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_S):
        try:
            dist.broadcast_object_list([[]], src=0)
        except RuntimeError:
            return  # what broke breaks the last broadcast too, whose error is told
