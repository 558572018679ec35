"""Differentiable redistributions: one function per row of the table in `rules.redistribute`.

Each function takes a local tensor and an `AxisGroup` (and tensor dims where a split is involved), moves the value
forward and carries the conjugate movement as its backward. They are the targets of `call_function` nodes, so a
rewritten program names every movement of data. Integers and bools pass too; they have no backward.

A group of one process does nothing. Inputs need not be contiguous; outputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class AxisGroup:
    """The processes along one mesh axis that include this one.

    Attributes:
        name: of the mesh axis.
        size: number of processes.
        index: position of this process, 0 <= index < size.
        process_group: None where size is 1 (or in a program that is only printed).
    """

    name: str
    size: int
    index: int
    process_group: dist.ProcessGroup | None = None

    def __repr__(self) -> str:
        return f"AxisGroup({self.name}, {self.index} of {self.size})"


def slice_dim(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """This rank's slice of `dim`, as a view."""
    length = x.shape[dim] // axis.size
    return x.narrow(dim, axis.index * length, length)


def slice_copy(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """This rank's slice of `dim`, in memory of its own, so that nothing keeps the whole tensor alive."""
    return slice_dim(x, axis, dim).clone(memory_format=torch.contiguous_format)


def pad_dim(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """`x` in this rank's slice of a tensor of zeros that is `axis.size` times as long in `dim`."""
    shape = list(x.shape)
    shape[dim] *= axis.size
    whole = x.new_zeros(shape)
    slice_dim(whole, axis, dim).copy_(x)
    return whole


def first_only(x: Tensor, axis: AxisGroup) -> Tensor:
    """`x` on the first rank, zeros on the others: one term of a sum that is `x`."""
    return x if axis.index == 0 else torch.zeros_like(x)


def all_reduce_sum(x: Tensor, axis: AxisGroup) -> Tensor:
    """Sum over the ranks of the axis, on every rank."""
    if axis.size == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.process_group)
    return taken_over(total) if x.device.type == "cpu" else total


def taken_over(buffer: Tensor) -> Tensor:
    """The value of a buffer whose collective is over, and its memory: it goes when the value goes.

    A thread of the communication library refers to the buffer a while longer, by chance until long after that.
    """
    value = buffer.detach()
    buffer.set_()  # type: ignore[call-overload]
    return value


def let_go(buffer: Tensor) -> None:
    """Give back the memory of a buffer now that its collective is over, and all that lies in it.

    A thread of the communication library refers to it a while longer, by chance until long after the next allocation.
    """
    buffer.untyped_storage().resize_(0)


def all_gather_dim(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """Slices of all ranks, joined along `dim`."""
    if axis.size == 1:
        return x
    mine = x.contiguous()
    every = x.new_empty((axis.size, *x.shape))
    all_gather_flat(every.view(-1), mine.view(-1), axis).wait()
    if not dim:
        return every.view(axis.size * x.shape[0], *x.shape[1:])
    joined = torch.cat(every.unbind(0), dim)
    let_go(every)
    return joined


def reduce_scatter_dim(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """This rank's slice, along `dim`, of the sum over ranks."""
    if axis.size == 1:
        return x
    chunks = torch.stack(x.chunk(axis.size, dim)).contiguous()
    shape = chunks.shape[1:]
    return SliceOfSum(chunks, axis).result().view(shape)


class SliceOfSum:
    """This rank's slice of a sum over ranks, under way.

    The sum takes the place of this rank's terms; the slice has memory of its own only once it is there. Gloo has no
    reduce_scatter of its own: it sums a copy everywhere. The copy is what is spared here.
    """

    def __init__(self, parts: Tensor, axis: AxisGroup) -> None:
        """Start: parts[axis.size, ..], a slice for each rank, fill memory of their own and are lost."""
        self._index = axis.index
        self._parts: Tensor | None = parts.view(axis.size, -1)
        self._mine: Tensor | None = None
        group, row = axis.process_group, self._parts[axis.index]
        if parts.device.type == "cpu":
            self._work: dist.Work = dist.all_reduce(self._parts, group=group, async_op=True)
        else:
            self._work = _reduce_scatter_single(row, parts.view(-1), group=group, async_op=True)

    def wait(self) -> None:
        """Until the slice is there; the parts are let go."""
        if self._parts is None:
            return
        self._work.wait()
        self._mine = self._parts[self._index].clone()
        let_go(self._parts)
        self._parts = None

    def result(self) -> Tensor:
        """The slice, flat; waits for it."""
        self.wait()
        assert self._mine is not None
        return self._mine


EXCHANGE_BYTES = 1 << 16
"""Of a result, from which on a copy of it costs more than messages do."""


class Exchange:
    """An all_gather under way as one message from each rank to each other.

    Gloo's own has a buffer as large as the result beside it, and a thread that lets the result go late.
    """

    def __init__(self, parts: Tensor, mine: Tensor, axis: AxisGroup) -> None:
        """Start: into parts[axis.size * N], mine[N] of all ranks; mine may lie where it belongs in parts."""
        group, rows = axis.process_group, parts.view(axis.size, -1)
        if rows[axis.index].data_ptr() != mine.data_ptr():
            rows[axis.index].copy_(mine)
        started: list[dist.Work | None] = []
        for distance in range(1, axis.size):
            before, after = (axis.index - distance) % axis.size, (axis.index + distance) % axis.size
            started.append(dist.irecv(rows[before], group=group, group_src=before))
            started.append(dist.isend(mine, group=group, group_dst=after))
        self._works = [work for work in started if work is not None]

    def wait(self) -> None:
        """Until all parts are there, and sent."""
        for work in self._works:
            work.wait()
        self._works = []


def all_gather_flat(parts: Tensor, mine: Tensor, axis: AxisGroup) -> dist.Work | Exchange:
    """Start: into parts[axis.size * N], mine[N] of all ranks; mine may lie where it belongs in parts."""
    if parts.device.type == "cpu" and parts.numel() * parts.element_size() >= EXCHANGE_BYTES:
        return Exchange(parts, mine, axis)
    work: dist.Work = _all_gather_single(parts, mine, group=axis.process_group, async_op=True)
    return work


def all_to_all_dims(x: Tensor, axis: AxisGroup, source_dim: int, target_dim: int) -> Tensor:
    """From slices of `source_dim` to slices of `target_dim`."""
    if axis.size == 1:
        return x
    sent = torch.stack(x.chunk(axis.size, target_dim)).contiguous()
    received = sent.new_empty(sent.shape)
    dist.all_to_all_single(received.view(-1), sent.view(-1), group=axis.process_group)
    let_go(sent)
    joined = torch.cat(received.unbind(0), source_dim)
    let_go(received)
    return joined


class _Conjugate(torch.autograd.Function):
    """`forward_move(x)` whose gradient is `backward_move(gradient)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward_move: Callable[[Tensor], Tensor], backward_move: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.backward_move = backward_move
        moved = forward_move(x)
        return moved.view_as(moved) if moved is x else moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_move(gradients[0]), None, None


def _move(x: Tensor, forward_move: Callable[[Tensor], Tensor], backward_move: Callable[[Tensor], Tensor]) -> Tensor:
    moved: Tensor = _Conjugate.apply(x, forward_move, backward_move)  # type: ignore[no-untyped-call]
    return moved


def invariant_to_replicate(x: Tensor, axis: AxisGroup) -> Tensor:
    """I -> R: nothing; backward all_reduce."""
    return _move(x, lambda t: t, lambda g: all_reduce_sum(g, axis))


def invariant_to_shard(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """I -> Sd: slice; backward all_gather."""
    return _move(x, lambda t: slice_copy(t, axis, dim), lambda g: all_gather_dim(g, axis, dim))


def invariant_to_partial(x: Tensor, axis: AxisGroup) -> Tensor:
    """I -> P: zero but rank 0; backward nothing."""
    return _move(x, lambda t: first_only(t, axis), lambda g: g)


def replicate_to_invariant(x: Tensor, axis: AxisGroup) -> Tensor:
    """R -> I: nothing; backward zero but rank 0."""
    return _move(x, lambda t: t, lambda g: first_only(g, axis))


def replicate_to_shard(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """R -> Sd: slice; backward zero padding."""
    return _move(x, lambda t: slice_copy(t, axis, dim), lambda g: pad_dim(g, axis, dim))


def replicate_to_partial(x: Tensor, axis: AxisGroup) -> Tensor:
    """R -> P: zero but rank 0; backward the same."""
    return _move(x, lambda t: first_only(t, axis), lambda g: first_only(g, axis))


def shard_to_invariant(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """Sd -> I: all_gather; backward slice."""
    return _move(x, lambda t: all_gather_dim(t, axis, dim), lambda g: slice_copy(g, axis, dim))


def shard_to_replicate(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """Sd -> R: all_gather; backward reduce_scatter."""
    return _move(x, lambda t: all_gather_dim(t, axis, dim), lambda g: reduce_scatter_dim(g, axis, dim))


def shard_to_shard(x: Tensor, axis: AxisGroup, source_dim: int, target_dim: int) -> Tensor:
    """Sd -> Se: all_to_all both ways."""
    return _move(
        x,
        lambda t: all_to_all_dims(t, axis, source_dim, target_dim),
        lambda g: all_to_all_dims(g, axis, target_dim, source_dim),
    )


def partial_to_invariant(x: Tensor, axis: AxisGroup) -> Tensor:
    """P -> I: all_reduce; backward nothing."""
    return _move(x, lambda t: all_reduce_sum(t, axis), lambda g: g)


def partial_to_replicate(x: Tensor, axis: AxisGroup) -> Tensor:
    """P -> R: all_reduce both ways."""
    return _move(x, lambda t: all_reduce_sum(t, axis), lambda g: all_reduce_sum(g, axis))


def partial_to_shard(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    """P -> Sd: reduce_scatter; backward all_gather."""
    return _move(x, lambda t: reduce_scatter_dim(t, axis, dim), lambda g: all_gather_dim(g, axis, dim))


STEP_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "IR": invariant_to_replicate, "IS": invariant_to_shard, "IP": invariant_to_partial,
        "RI": replicate_to_invariant, "RS": replicate_to_shard, "RP": replicate_to_partial,
        "SI": shard_to_invariant, "SR": shard_to_replicate, "SS": shard_to_shard,
        "PI": partial_to_invariant, "PR": partial_to_replicate, "PS": partial_to_shard,
    }
)  # fmt: skip
"""Function of a `RedistributeStep`, by its `kinds`. Extra arguments are the dims of the splits, source first."""
