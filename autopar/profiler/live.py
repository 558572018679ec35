"""Live bytes: what torch's CPU allocator has handed out at the worst moment, to the byte.

Counts every tensor and every temporary inside kernels, from the moment that the context is entered; what was allocated
before does not count. Buffers of the communication library and the allocator's own slack are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from autopar import torch_adapter


class LiveBytes:
    """Context that records allocations; `peak_bytes` and `left_bytes` are known when it is left."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.left_bytes = 0
        self._profiler = torch_adapter.allocation_profiler()

    def __enter__(self) -> LiveBytes:
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.stop()
        self.peak_bytes, self.left_bytes = replay(torch_adapter.allocation_events(self._profiler))


def replay(events: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Highest and last sum of live blocks.

    Args:
        events: (address, bytes), negative where a block is given back. A block that is handed out at an address where
            one lives already takes its place: that one was given back unseen.
    """
    live: dict[int, int] = {}
    now = highest = 0
    for address, size in events:
        now -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            now += size
            highest = max(highest, now)
    return highest, now
