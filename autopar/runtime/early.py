"""Early: gradients of zero2 parameters, summed over ranks and cut as soon as a microbatch has left them.

Their buckets start from hooks of backward, whatever else is overlapped. One is under way at a time: before the next
starts, what it leaves is added to the rank's parts. A gradient that came in pieces (chunks of an interleaved pipeline
that take turns, branches that a microbatch does not reach) waits for its bucket, at the latest for the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from autopar.runtime.buckets import Bucket


class Early:
    """See the module docstring."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._uses: Mapping[str, int] = {}
        self._left: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._running: Bucket | None = None

    def watch(self, uses: Mapping[str, int]) -> None:
        """From now on start buckets while backward runs.

        Args:
            uses: by value name, how many backwards of a microbatch add to each gradient.
        """
        self._uses = uses
        for bucket in self._buckets:
            for member in bucket.members:
                register: Any = member.leaf.register_post_accumulate_grad_hook
                register(self._hook(member.name, bucket))
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self._sums = {}
        for bucket in self._buckets if self._uses else ():
            self._expect(bucket)

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """After the last microbatch: this rank's part of every gradient, by name."""
        for bucket in self._buckets:
            if any(member.leaf.grad is not None for member in bucket.members):
                self._reduce(bucket)
        self._settle()
        found, self._sums = self._sums, {}
        return iter(found.items())

    def _expect(self, bucket: Bucket) -> None:
        bucket.missing = len(bucket.members)
        self._left |= {member.name: self._uses[member.name] for member in bucket.members}

    def _hook(self, name: str, bucket: Bucket) -> Callable[[Tensor], None]:
        def added(_: Tensor) -> None:
            self._left[name] -= 1
            if not self._left[name]:
                bucket.missing -= 1
                if not bucket.missing:
                    self._reduce(bucket)
                    self._expect(bucket)

        return added

    def _reduce(self, bucket: Bucket) -> None:
        self._settle()
        bucket.start()
        self._running = bucket

    def _settle(self) -> None:
        """Wait for the bucket under way and add what it leaves."""
        if self._running is None:
            return
        for name, part in self._running.finish():
            before = self._sums.get(name)
            self._sums[name] = part if before is None else before.add_(part)
        self._running = None
