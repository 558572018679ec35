"""Prices of redistributions between sets of shardings, as matrices linear in the value's size.

Which collectives turn one sharding into another does not depend on sizes, so it is found once per pair and kept; a
mesh only fills in numbers. The cost of moving a value of B bytes (whole) from i to j is

    forward_s = latency_f[i, j] + B * slope_f[i, j],   backward_s likewise,   energy_j = B * slope_e[i, j]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.cost.collective import COLLECTIVES, collective_cost
from autopar.cost.hardware import Cluster
from autopar.cost.layouts import Codes, Mask, sharding_of
from autopar.ir.cost import Array
from autopar.ir.mesh import StageMesh
from autopar.ir.placement import Sharding
from autopar.rules.redistribute import RedistributeStep, redistribute_steps

FORWARD, BACKWARD = 0, 1
NUM_TERMS = 5
"""Columns of a price: forward latency and slope, backward latency and slope, energy slope."""


@dataclass(frozen=True)
class Prices:
    """One entry per pair; forbidden pairs are inf in `forward_s`."""

    forward_s: Array
    backward_s: Array
    energy_j: Array


class Transfers:
    """Redistribution plans of one number of mesh axes, found on demand."""

    def __init__(self, num_axes: int, *, training: bool = True) -> None:
        """`training` False: nothing flows back."""
        self.num_axes = num_axes
        self.training = training
        self._ids: dict[tuple[int, int, bool], int] = {}
        self._matrices: dict[tuple[bytes, bytes, bool], NDArray[np.int64]] = {}
        self._forbidden: list[bool] = []
        self._entries: list[tuple[int, int, int, int, int]] = []
        self._columns: NDArray[np.int64] = np.zeros((0, 5), dtype=np.int64)

    def matrix(self, sources: Codes, targets: Codes, requires_grad: bool) -> NDArray[np.int64]:
        """Pair numbers of all sources with all targets (sharding ids, each without duplicates)."""
        key = (sources.tobytes(), targets.tobytes(), requires_grad)
        found = self._matrices.get(key)
        if found is None:
            rows = [[self._pair(int(s), int(t), requires_grad) for t in targets] for s in sources]
            found = self._matrices[key] = np.asarray(rows, dtype=np.int64).reshape(len(sources), len(targets))
        return found

    def each(self, sources: Codes, targets: Codes, requires_grad: Mask) -> NDArray[np.int64]:
        """Pair numbers of source i with target i."""
        pairs = zip(sources.tolist(), targets.tolist(), requires_grad.tolist(), strict=True)
        return np.asarray([self._pair(*pair) for pair in pairs], dtype=np.int64)

    def terms(self, cluster: Cluster, mesh: StageMesh) -> Array:
        """[pair, NUM_TERMS] of every pair numbered so far; forbidden pairs have inf forward latency."""
        terms = np.zeros((len(self._forbidden), NUM_TERMS))
        if len(self._columns) < len(self._entries):
            self._columns = np.asarray(self._entries, dtype=np.int64).reshape(-1, 5)
        costs = [
            [collective_cost(cluster, kind, mesh.group(axis)) for kind in COLLECTIVES] for axis in range(self.num_axes)
        ]
        latency, slope, energy = (
            np.asarray([[getattr(cost, name) for cost in row] for row in costs]).reshape(
                self.num_axes, len(COLLECTIVES)
            )
            for name in ("latency_s", "s_per_byte", "j_per_byte")
        )
        pair, phase, axis, kind, sharded = self._columns.T
        share = 1 / _parts(mesh.sizes)[sharded]
        for column, cell in (
            (2 * phase, latency[axis, kind]), (2 * phase + 1, slope[axis, kind] * share),
            (4, energy[axis, kind] * share),
        ):  # fmt: skip
            terms += np.bincount(pair * NUM_TERMS + column, cell, terms.size).reshape(terms.shape)
        terms[np.asarray(self._forbidden, dtype=bool), 0] = np.inf
        return terms

    def _pair(self, source: int, target: int, requires_grad: bool) -> int:
        key = (source, target, requires_grad)
        if key not in self._ids:
            number = self._ids[key] = len(self._forbidden)
            shardings = (sharding_of(source, self.num_axes), sharding_of(target, self.num_axes))
            steps = redistribute_steps(*shardings, (2,) * self.num_axes, requires_grad)
            self._forbidden.append(steps is None)
            self._add_entries(number, shardings[0], steps or (), requires_grad)
        return self._ids[key]

    def _add_entries(self, pair: int, state: Sharding, steps: Sequence[RedistributeStep], requires_grad: bool) -> None:
        for step in steps:
            for phase, collective in ((FORWARD, step.forward), (BACKWARD, step.backward)):
                if collective in COLLECTIVES and (phase == FORWARD or (requires_grad and self.training)):
                    keep_axis = collective == "all_to_all"
                    sharded = sum(
                        1 << axis for axis, p in enumerate(state) if p.is_shard and (keep_axis or axis != step.axis)
                    )
                    self._entries.append((pair, phase, step.axis, COLLECTIVES.index(collective), sharded))
            state = (*state[: step.axis], step.target, *state[step.axis + 1 :])


def visible_terms(terms: Array, share: float) -> Array:
    """What shows of redistributions that run in pieces beside the GEMM before or after them: a share of their time."""
    scale = np.ones(NUM_TERMS)
    scale[:4] = share
    return np.where(np.isfinite(terms), terms * scale, terms)


def _parts(sizes: Sequence[int]) -> Array:
    """Parts that each set of sharded axes (as bits) cuts a tensor into."""
    parts = np.ones(1 << len(sizes))
    for axis, size in enumerate(sizes):
        parts[(np.arange(len(parts)) >> axis) & 1 == 1] *= size
    return parts


def price(terms: Array, pairs: NDArray[np.int64], num_bytes: Array | float) -> Prices:
    """Prices of values of `num_bytes` (whole) for an array of pair numbers."""
    found = terms[pairs]
    return Prices(
        found[..., 0] + num_bytes * found[..., 1],
        found[..., 2] + num_bytes * found[..., 3],
        num_bytes * found[..., 4],
    )
