"""Several tensors in one run of memory, so that one collective moves all of them.

Tensors that are split lie rank by rank: `[ranks, total]`, in row r slice r of each tensor, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from autopar.program.collectives import AxisGroup, SliceOfSum, all_gather_flat, let_go

T = TypeVar("T")


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one run of memory; a single tensor as it is."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1)
    return torch.cat([x.reshape(-1) for x in tensors])


def views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes, one after another in `flat`."""
    parts = torch.split_with_sizes(flat, [torch.Size(shape).numel() for shape in shapes])
    return [part.view(torch.Size(shape)) for part, shape in zip(parts, shapes, strict=True)]


def slices_of(x: Tensor, dim: int, count: int) -> Tensor:
    """[count, ..]: the slices of a tensor along `dim`, as a view."""
    return torch.unflatten(x, dim, (count, -1)).movedim(dim, 0)


def stacked_slices(tensors: Sequence[Tensor], dims: Sequence[int], count: int) -> Tensor:
    """[count, total]: in row r slice r of each tensor along its dim, one after another."""
    sizes = [x.numel() // count for x in tensors]
    stacked = tensors[0].new_empty((count, sum(sizes)))
    for x, dim, part in zip(tensors, dims, torch.split_with_sizes(stacked, sizes, 1), strict=True):
        slices = slices_of(x, dim, count)
        part.view(slices.shape).copy_(slices)
    return stacked


def spread_slices(stacked: Tensor, wholes: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Inverse of `stacked_slices`, into tensors that are there."""
    count = stacked.shape[0]
    rows = torch.split_with_sizes(stacked, [whole.numel() // count for whole in wholes], 1)
    for row, whole, dim in zip(rows, wholes, dims, strict=True):
        slices = slices_of(whole, dim, count)
        slices.copy_(row.view(slices.shape))


def grown(part: Tensor, dim: int, count: int) -> Tensor:
    """Memory for `count` such parts along `dim`."""
    return part.new_empty([size * count if i == dim else size for i, size in enumerate(part.shape)])


class Gather:
    """One all_gather of tensors of one dtype under way."""

    def __init__(self, parts: Sequence[Tensor], dims: Sequence[int], axis: AxisGroup) -> None:
        """Start it.

        Args:
            parts: this rank's slices.
            dims: along which each is sliced.
            axis: of several ranks.
        """
        self._parts, self._dims, self._size = list(parts), list(dims), axis.size
        self._every: Tensor | None = parts[0].new_empty((axis.size, sum(part.numel() for part in parts)))
        self._work = all_gather_flat(self._every.view(-1), self._sent(self._every[axis.index]), axis)

    def _sent(self, place: Tensor) -> Tensor:
        """This rank's parts in one run: where they belong in the result, or a single part where it lies."""
        if len(self._parts) == 1 and self._parts[0].is_contiguous():
            return self._parts[0].view(-1)
        for row, whole in zip(views(place, [part.shape for part in self._parts]), self._parts, strict=True):
            row.copy_(whole)
        return place

    def finish_into(self, wholes: Sequence[Tensor]) -> None:
        """Wait; fill tensors. Call this or `finish`, once."""
        self._work.wait()
        assert self._every is not None
        spread_slices(self._every, wholes, self._dims)
        let_go(self._every)
        self._every = None

    def finish(self) -> list[Tensor]:
        """Wait; the joined tensors."""
        if len(self._parts) > 1 or self._dims[0] or not self._parts[0].dim():
            wholes = [grown(part, dim, self._size) for part, dim in zip(self._parts, self._dims, strict=True)]
            self.finish_into(wholes)
            return wholes
        self._work.wait()
        assert self._every is not None
        (part,), every, self._every = self._parts, self._every, None
        return [every.view(self._size * part.shape[0], *part.shape[1:])]


class Scatter:
    """One reduce_scatter of tensors of one dtype under way."""

    def __init__(self, tensors: Sequence[Tensor], dims: Sequence[int], axis: AxisGroup) -> None:
        """Start it: each rank wants its slices, along `dims`, of the sums over ranks."""
        self._shapes = [_sliced(x.shape, dim, axis.size) for x, dim in zip(tensors, dims, strict=True)]
        self.work = SliceOfSum(stacked_slices(tensors, dims, axis.size), axis)

    def slices(self) -> list[Tensor]:
        """This rank's, in one run of memory; waits for them."""
        return views(self.work.result(), self._shapes)


def _sliced(shape: Sequence[int], dim: int, count: int) -> tuple[int, ...]:
    return tuple(size // count if i == dim else size for i, size in enumerate(shape))


def in_groups(
    items: Iterable[T], key: Callable[[T], object], tensor: Callable[[T], Tensor], limit_bytes: float
) -> list[list[T]]:
    """Items of equal keys together, in order, with at most `limit_bytes` of their tensors in a group of several."""
    open_: dict[object, list[T]] = {}
    held_bytes: dict[object, int] = {}
    closed: list[list[T]] = []
    for item in items:
        own, size = key(item), tensor(item).numel() * tensor(item).element_size()
        if own in open_ and held_bytes[own] + size > limit_bytes:
            closed.append(open_.pop(own))
        open_.setdefault(own, []).append(item)
        held_bytes[own] = size + (held_bytes[own] if len(open_[own]) > 1 else 0)
    return [*closed, *open_.values()]
