"""Experts split over ranks: each rank runs its own experts on the (token, choice) pairs that chose them.

Along each axis a rank either picks its pairs from those that all ranks hold, and gives one term of a sum, or it sends
every pair to the rank of its expert and gets the results back. Axes nest: the experts that the outer axis leaves are
split by the inner one. How many pairs a rank gets depends on the data.

Shapes: N pairs, T tokens, N = k T; pair i belongs to token i // k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.program.collectives import AxisGroup

Core = Callable[..., Tensor]
"""(number of pairs, operands of the region by pair, ids counted from this rank's first expert) -> result by pair."""


@dataclass(frozen=True)
class _Pairs:
    """Operands by pair: `tensors[i]` has a row for every `choices[i]` pairs; `ids` are experts of the current range."""

    tensors: tuple[Tensor, ...]
    choices: tuple[int, ...]
    ids: Tensor

    def at(self, index: Tensor) -> _Pairs:
        """The pairs at some positions, with rows of their own."""
        rows = tuple(t[index // c if c > 1 else index] for t, c in zip(self.tensors, self.choices, strict=True))
        return _Pairs(rows, (1,) * len(rows), self.ids[index])


def split_experts(
    *operands: Tensor,
    core: Core,
    ids: int,
    pairs_per_row: Sequence[int],
    num_experts: int,
    expert_axes: tuple[AxisGroup, ...],
    is_exchanged: Sequence[bool],
) -> Tensor:
    """The region's result [N ..], of which ranks hold terms, or on exchanged axes their own rows.

    Args:
        operands: of the region; parameters hold this rank's experts in dim 0.
        core: the region's calls.
        ids: which operand is the expert of each pair, 0 <= id < num_experts.
        pairs_per_row: of each operand, k for one by token, 1 by pair, 0 for a parameter.
        num_experts: over all ranks.
        expert_axes: axes that split the experts, outermost first.
        is_exchanged: for each of them, whether pairs are sent to their experts.
    """
    by_row = [i for i, count in enumerate(pairs_per_row) if count and i != ids]

    def run(pairs: _Pairs) -> Tensor:
        held = list(operands)
        for i, tensor in zip(by_row, pairs.tensors, strict=True):
            held[i] = tensor
        held[ids] = pairs.ids
        return core(len(pairs.ids), *held)

    pairs = _Pairs(tuple(operands[i] for i in by_row), tuple(pairs_per_row[i] for i in by_row), operands[ids])
    return _run(run, pairs, num_experts, tuple(zip(expert_axes, is_exchanged, strict=True)))


def _run(
    run: Callable[[_Pairs], Tensor], pairs: _Pairs, num_experts: int, axes: tuple[tuple[AxisGroup, bool], ...]
) -> Tensor:
    if not axes:
        return _at_least_one(run, pairs)
    (axis, is_exchanged), inner = axes[0], axes[1:]
    block = num_experts // axis.size
    owner = pairs.ids // block
    if is_exchanged:
        return _exchange_around(lambda own: _run(run, own, block, inner), pairs, owner, block, axis)
    index = (owner == axis.index).nonzero().squeeze(1)
    own = pairs.at(index)
    result = _run(run, _Pairs(own.tensors, own.choices, own.ids - axis.index * block), block, inner)
    return result.new_zeros((len(pairs.ids), *result.shape[1:])).index_copy(0, index, result)


def _at_least_one(run: Callable[[_Pairs], Tensor], pairs: _Pairs) -> Tensor:
    """Kernels need not know empty batches: a rank without pairs runs one of zeros and drops the result."""
    if len(pairs.ids):
        return run(pairs.at(torch.arange(len(pairs.ids), device=pairs.ids.device)) if max(pairs.choices) > 1 else pairs)
    tensors = tuple(torch.cat([t, t.new_zeros((1, *t.shape[1:]))]) for t in pairs.tensors)
    return run(_Pairs(tensors, pairs.choices, pairs.ids.new_zeros(1)))[:0]


def _exchange_around(
    run: Callable[[_Pairs], Tensor], pairs: _Pairs, owner: Tensor, block: int, axis: AxisGroup
) -> Tensor:
    """Send pairs to the owners of their experts, run there, send the results back."""
    order = owner.argsort(stable=True)
    sent = owner.bincount(minlength=axis.size)
    counts = torch.empty_like(sent)
    if axis.size > 1:
        dist.all_to_all_single(counts, sent, group=axis.process_group)
    else:
        counts.copy_(sent)
    there, back = _Splits(sent.tolist(), counts.tolist()), _Splits(counts.tolist(), sent.tolist())
    sorted_pairs = pairs.at(order)
    received = _Pairs(
        tuple(_exchange(t, axis, there, back) for t in sorted_pairs.tensors),
        sorted_pairs.choices,
        _move(sorted_pairs.ids, axis, there) - axis.index * block,
    )
    result = _exchange(run(received), axis, back, there)
    return result[order.argsort()]


@dataclass(frozen=True)
class _Splits:
    """Rows that go to, and come from, each rank of an axis."""

    sent: list[int]
    received: list[int]


def _move(x: Tensor, axis: AxisGroup, splits: _Splits) -> Tensor:
    if axis.size == 1:
        return x
    received = x.new_empty((sum(splits.received), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), splits.received, splits.sent, group=axis.process_group)
    return received


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; gradients the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: AxisGroup, there: _Splits, back: _Splits) -> Tensor:
        ctx.axis, ctx.back = axis, back
        moved = _move(x, axis, there)
        return moved.view_as(moved) if moved is x else moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _move(gradients[0], ctx.axis, ctx.back), None, None, None


def _exchange(x: Tensor, axis: AxisGroup, there: _Splits, back: _Splits) -> Tensor:
    moved: Tensor = _Exchange.apply(x, axis, there, back)  # type: ignore[no-untyped-call]
    return moved
