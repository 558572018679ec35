"""Layouts: choices of nodes as arrays of placement codes, so that sizes and prices are array arithmetic.

A placement is a small integer (`I` 0, `R` 1, `P` 2, `Sd` 3 + d), a sharding one integer in base CODES with the
outermost axis first. `[choice, axis]` arrays of codes describe all choices of an operand at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, Placement, Sharding, shard

CODES = 16
INVARIANT_CODE, REPLICATE_CODE, PARTIAL_CODE, SHARD_CODE = 0, 1, 2, 3
Codes: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


def code_of(placement: Placement) -> int:
    """Code of a placement."""
    if placement.is_shard:
        return SHARD_CODE + placement.dim
    return (INVARIANT, REPLICATE, PARTIAL).index(placement)


def placement_of(code: int) -> Placement:
    """Inverse of `code_of`."""
    return shard(code - SHARD_CODE) if code >= SHARD_CODE else (INVARIANT, REPLICATE, PARTIAL)[code]


def sharding_ids(codes: Codes) -> Codes:
    """One integer per row of codes."""
    ids = np.zeros(len(codes), dtype=np.int64)
    for axis in range(codes.shape[1]):
        ids = ids * CODES + codes[:, axis]
    return ids


def sharding_of(sharding_id: int, num_axes: int) -> Sharding:
    """Inverse of `sharding_ids` for one row."""
    codes = []
    for _ in range(num_axes):
        sharding_id, code = divmod(sharding_id, CODES)
        codes.append(code)
    return tuple(placement_of(code) for code in reversed(codes))


def without_gradient(codes: Codes) -> Codes:
    """Codes of a value without gradient, for which `I` and `R` are the same."""
    return np.where(codes == REPLICATE_CODE, INVARIANT_CODE, codes)


@dataclass(frozen=True)
class Grid:
    """Every combination of per-axis choices of one node.

    Attributes:
        choices: tuples with one entry per axis (AxisStrategy or ParameterAxisStrategy).
        axis_index: [choice, axis], position of the entry among that axis' choices.
    """

    choices: tuple[tuple[Any, ...], ...]
    axis_index: Codes

    def codes(self, per_axis: Sequence[Sequence[Placement]]) -> Codes:
        """[choice, axis] codes of one tensor, given its placement under each choice of each axis."""
        columns = [
            np.asarray([code_of(p) for p in placements], dtype=np.int64)[self.axis_index[:, axis]]
            for axis, placements in enumerate(per_axis)
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.choices), 0), dtype=np.int64)


def make_grid(per_axis: Sequence[Sequence[Any]]) -> Grid:
    """Product of the axes' choices, last axis fastest."""
    indices = list(itertools.product(*(range(len(options)) for options in per_axis)))
    choices = tuple(tuple(per_axis[axis][i] for axis, i in enumerate(row)) for row in indices)
    return Grid(choices, np.asarray(indices, dtype=np.int64).reshape(len(indices), len(per_axis)))
