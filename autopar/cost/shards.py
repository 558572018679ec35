"""Shards: many shardings of many tensors at once, as flat arrays.

A row is one sharding of one tensor. Which dim each axis cuts is static; into how many parts a row is cut, and whether
evenly, follows from shapes and axis sizes by array arithmetic over all rows together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost.layouts import SHARD_CODE, Codes, Mask
from autopar.ir.cost import Array
from autopar.ir.graph import OpGraph
from autopar.ir.tensor import BYTES_BY_DTYPE


@dataclass(frozen=True)
class Sizes:
    """Tensors of one microbatch: `shapes` is [tensor, dim], padded with 1; `num_bytes` is [tensor]."""

    shapes: Codes
    num_bytes: Array


class Tensors:
    """The graph's values as rows, at any number of microbatches.

    Attributes:
        values, dims: of the graph, and the batch dim of each.
        index: row of each value.
        width: padded number of dims; the last column is always 1.
    """

    def __init__(self, graph: OpGraph, dims: Mapping[str, int | None]) -> None:
        self.values, self.dims = graph.values, dims
        values = list(graph.values.values())
        self.index = {value.name: row for row, value in enumerate(values)}
        self.width = max((len(value.meta.shape) for value in values), default=0) + 1
        self._shapes = np.ones((len(values), self.width), dtype=np.int64)
        for row, value in enumerate(values):
            self._shapes[row, : len(value.meta.shape)] = value.meta.shape
        self._item_bytes = np.array([BYTES_BY_DTYPE[value.meta.dtype] for value in values], dtype=np.int64)
        cut = [(row, dim) for row, value in enumerate(values) if (dim := dims[value.name]) is not None]
        self._batched = tuple(np.array(cut, dtype=np.int64).reshape(-1, 2).T)
        self._common = math.gcd(graph.batch_size, *map(int, self._shapes[self._batched]))
        self._sizes: dict[int, Sizes] = {}

    def divides(self, num_microbatches: int) -> bool:
        """Whether every batch dim divides into that many microbatches."""
        return self._common % num_microbatches == 0

    def at(self, num_microbatches: int) -> Sizes:
        """Sizes of one microbatch; the batch must divide."""
        if num_microbatches not in self._sizes:
            shapes = self._shapes.copy()
            shapes[self._batched] //= num_microbatches
            self._sizes[num_microbatches] = Sizes(shapes, (shapes.prod(axis=1) * self._item_bytes).astype(np.float64))
        return self._sizes[num_microbatches]


@dataclass(frozen=True)
class ShardRows:
    """Shardings of tensors.

    Attributes:
        tensor: [row], row of the tensor in `Tensors`.
        sharded: per axis [row], whether the axis cuts the tensor.
        at: per axis [row], flat position in `Sizes.shapes` of the dim that it cuts.
        together: (outer axis, inner axis, [row]), whether both cut the same dim; pairs where some row does.
    """

    tensor: Codes
    sharded: tuple[Mask, ...]
    at: tuple[Codes, ...]
    together: tuple[tuple[int, int, Mask], ...]

    def parts(self, sizes: Sizes, axis_sizes: Sequence[int]) -> tuple[Array, Mask]:
        """Into how many parts each row cuts its tensor, and whether it does so evenly."""
        parts = np.ones(len(self.tensor))
        even: Mask = np.ones(len(self.tensor), dtype=np.bool_)
        flat = sizes.shapes.reshape(-1)
        for axis, size in enumerate(axis_sizes):
            if size == 1:
                continue
            parts = np.where(self.sharded[axis], parts * size, parts)
            split: Codes | int = size
            for outer, inner, both in self.together:
                if inner == axis:
                    split = split * np.where(both, axis_sizes[outer], 1)
            even &= ~self.sharded[axis] | (flat[self.at[axis]] % split == 0)
        return parts, even


def shard_rows(tensor: Codes, codes: Codes, width: int) -> ShardRows:
    """Rows of `tensor[i]` under `codes[i]` ([row, axis]); `width` is that of `Tensors`."""
    num_axes = codes.shape[1]
    sharded = tuple(codes[:, axis] >= SHARD_CODE for axis in range(num_axes))
    at = tuple(
        tensor * width + np.where(sharded[axis], codes[:, axis] - SHARD_CODE, width - 1) for axis in range(num_axes)
    )
    pairs = [(o, i, sharded[o] & (codes[:, o] == codes[:, i])) for i in range(num_axes) for o in range(i)]
    return ShardRows(tensor, sharded, at, tuple(pair for pair in pairs if pair[2].any()))
