"""Buckets: gradients of many parameters summed by one collective, while backward still runs where asked.

Parameters whose gradients need the same collectives, in the same dtype, share buckets of about `BUCKET_BYTES`, filled
against the order of the graph, in which backward finishes them. A bucket copies its gradients into one flat tensor and
lets the parameters' own ones go; results are views of it. Collectives start in the order of the buckets, which is the
same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from autopar.program.collectives import AxisGroup, SliceOfSum, slice_copy
from autopar.program.flat import Gather, Scatter, flattened, in_groups, views

BUCKET_BYTES = 25 * 2**20

SUM, SCATTER, SLICE = "sum", "scatter", "slice"


@dataclass(frozen=True)
class Reduction:
    """One step from a local gradient to the optimizer's part of the whole.

    Attributes:
        axis: index of the mesh axis.
        kind: `sum` over the axis; `scatter`: this rank's slice of the sum; `slice`: its slice of what is whole already.
        dim: of the slice; -1 for a sum.
    """

    axis: int
    kind: str
    dim: int = -1


@dataclass(frozen=True)
class Member:
    """A parameter of a bucket: its name, what backward adds to, and how its gradient is reduced."""

    name: str
    leaf: Tensor
    reductions: tuple[Reduction, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal where one collective can serve both."""
        return self.leaf.dtype, tuple((step.axis, step.kind) for step in self.reductions)


@dataclass
class Bucket:
    """Some members and, between `start` and `finish`, their reduction under way."""

    members: tuple[Member, ...]
    axes: Sequence[AxisGroup]
    missing: int = 0
    _present: list[Member] = field(default_factory=list)
    _running: Generator[dist.Work | SliceOfSum, None, list[Tensor]] | None = None
    _work: dist.Work | SliceOfSum | None = None
    _result: list[Tensor] | None = None

    @property
    def is_started(self) -> bool:
        return self._running is not None

    def start(self) -> None:
        """Take the gradients that there are and issue the first collective."""
        self._present = [member for member in self.members if member.leaf.grad is not None]
        gradients = [_taken(member.leaf) for member in self._present]
        self._running = reduce_together(gradients, [member.reductions for member in self._present], self.axes)
        self._advance()

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """Wait; the reduced gradient of each member that has one, by name."""
        while self._work is not None:
            self._work.wait()
            self._advance()
        found = zip([member.name for member in self._present], self._result or [], strict=True)
        self._running, self._result, self._present = None, None, []
        return found

    def _advance(self) -> None:
        assert self._running is not None
        try:
            self._work = next(self._running)
        except StopIteration as end:
            self._work, self._result = None, end.value


def _taken(leaf: Tensor) -> Tensor:
    """The leaf's gradient, which it gives up."""
    gradient = leaf.grad
    assert gradient is not None
    leaf.grad = None
    return gradient


def reduce_together(
    gradients: list[Tensor], reductions: Sequence[Sequence[Reduction]], axes: Sequence[AxisGroup]
) -> Generator[dist.Work | SliceOfSum, None, list[Tensor]]:
    """Reduce gradients whose steps differ in dims only; yields each collective, to be waited for before going on."""
    flat: Tensor | None = None
    for steps in zip(*reductions, strict=True):
        axis, kind = axes[steps[0].axis], steps[0].kind
        if kind == SLICE:
            gradients = [slice_copy(g, axis, step.dim) for g, step in zip(gradients, steps, strict=True)]
            flat = None
        elif kind == SUM:
            if flat is None:
                flat = flattened(gradients)
                gradients = views(flat, [g.shape for g in gradients])
            work = dist.all_reduce(flat, group=axis.process_group, async_op=True)
            assert work is not None
            yield work
        else:
            scatter, flat = Scatter(gradients, [step.dim for step in steps], axis), None
            gradients = []
            yield scatter.work
            gradients, flat = scatter.slices(), scatter.work.result()
    return gradients


def make_buckets(members: Sequence[Member], axes: Sequence[AxisGroup], limit_bytes: float) -> tuple[Bucket, ...]:
    """Buckets in the order in which backward fills them, given members in graph order."""
    groups = in_groups(members[::-1], lambda member: member.key, lambda member: member.leaf, limit_bytes)
    return tuple(Bucket(tuple(group), axes) for group in groups)


def gather_together(
    parts: list[Tensor], cuts: Sequence[Sequence[tuple[int, int]]], leaves: Sequence[Tensor], axes: Sequence[AxisGroup]
) -> None:
    """Fill leaves from the ranks' parts of them.

    Args:
        parts: of this rank.
        cuts: (mesh axis, dim) of the slicings that lead from each leaf to its part; axes are the same for all.
        leaves: to be filled.
        axes: of the mesh.
    """
    for level in reversed(range(len(cuts[0]))):
        axis, dims = axes[cuts[0][level][0]], [steps[level][1] for steps in cuts]
        gather = Gather(parts, dims, axis)
        if level:
            parts = gather.finish()
        else:
            gather.finish_into(leaves)


class Overlap:
    """Starts buckets from hooks of backward as soon as their gradients are complete."""

    def __init__(self, buckets: Sequence[Bucket], uses: Mapping[str, int]) -> None:
        """Hook the members.

        Args:
            buckets: in the order in which they are to start.
            uses: by name, how many backwards of a step add to each gradient.
        """
        self._buckets, self._uses = buckets, uses
        self._left: dict[str, int] = {}
        for bucket in buckets:
            for member in bucket.members:
                register: Any = member.leaf.register_post_accumulate_grad_hook
                register(self._hook(member.name, bucket))
        self.begin()

    def begin(self) -> None:
        """A new step."""
        self._left = {member.name: self._uses[member.name] for bucket in self._buckets for member in bucket.members}
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)

    def _hook(self, name: str, bucket: Bucket) -> Callable[[Tensor], None]:
        def added(_: Tensor) -> None:
            self._left[name] -= 1
            if not self._left[name]:
                bucket.missing -= 1
                self._start_complete()

        return added

    def _start_complete(self) -> None:
        for bucket in self._buckets:
            if bucket.missing:
                return
            if not bucket.is_started:
                bucket.start()
