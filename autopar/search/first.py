"""First: the ideal bounds of all skeletons at once, memory included, before any is looked at by itself.

A plain linear question asks for a T + b D with a weight a that depends on the number of devices. With one-device
figures of M microbatches (see `space.IdealBound`), nodes grouped by the axis sizes that split them, and

    pay(w) = sum over groups of f_group(w / split),   f_group(w) = sum over nodes of min over clocks of w t + b e

every skeleton has the bounds `spread` and `bottleneck` of `relax`. f is concave, so chords between the points of a
fixed grid lie below it, and all skeletons are priced by interpolation. The slowest stage is bounded by counting: of the
i costliest blocks some stage has ceil(i / K). Memory, where kept(b) <= what block b keeps of one microbatch, needs

    sum_b state_b + kept_b <= K n memory    and    sum_b state_b / h + kept_b <= n memory sum_k 1 / h_k ,

with h_k microbatches in flight on stage k and h the most of them. Full recompute pays every block's forward again.
Mixed recompute pays at least what the missing bytes cost at the block that saves most per unit of objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.ir.pipeline import microbatches_in_flight
from autopar.search.evaluate import MEMORY_TOLERANCE
from autopar.search.space import IdealBound, OneDevice, Skeleton, Skeletons

GRID = 192
"""Points of the grid of weights, spaced evenly in their logarithm; chords lose less than 1e-4."""

Index = NDArray[np.int64]


@dataclass(frozen=True)
class _Group:
    """Summed least costs of the nodes that split alike, at every weight of the grid.

    Attributes:
        own, shared: f of the module docstring for nodes of blocks and for shared nodes.
        again: what full recompute adds to `own`.
        again_by_class: the same of one block of each class, [class, grid].
    """

    own: Array
    shared: Array
    again: Array
    again_by_class: Array


class FirstBounds:
    """Bounds of all skeletons of a space for one weight per skeleton; see the module docstring."""

    def __init__(self, skeletons: Skeletons, ideal: IdealBound, memory_bytes: float, schedule: str) -> None:
        self.skeletons = skeletons
        self.ideal = ideal
        self.memory_bytes = memory_bytes * (1 + MEMORY_TOLERANCE)
        self.schedule = schedule
        self.devices = np.array([math.prod(mesh) for mesh in skeletons.meshes], dtype=np.int64)

    def levels(self, weights: Array, energy_weight: float) -> Array:
        """[skeleton], bounds of weight * T + energy_weight * D; inf where nothing fits."""
        levels = np.full(len(self.skeletons), np.inf)
        for count in np.unique(self.skeletons.counts).tolist():
            base = self.ideal.one_device(count)
            if base is not None:
                rows = np.flatnonzero(self.skeletons.counts == count)
                levels[rows] = _Rows(self, base, rows, count).levels(weights[rows], energy_weight)
        return levels


class _Rows:
    """The skeletons of one number of microbatches."""

    def __init__(self, source: FirstBounds, base: OneDevice, rows: Index, count: int) -> None:
        table = source.skeletons
        self.source, self.base, self.count = source, base, count
        self.stages, self.mesh, self.mode = table.stages[rows], table.mesh_index[rows], table.modes[rows]
        self.devices = source.devices[self.mesh]
        self.span = slice(table.clocks[0], table.clocks[1] + 1)
        splits = np.array([source.ideal.split(mesh, base) for mesh in table.meshes])
        self.splits, self.group_of = np.unique(splits, axis=1, return_inverse=True)
        self.group_of = self.group_of.reshape(-1)
        self.classes, self.class_of = np.unique(base.count[:, :-1], axis=1, return_inverse=True)
        self.class_of = self.class_of.reshape(-1)

    def levels(self, weights: Array, energy_weight: float) -> Array:
        waits = self.count - 1
        spread = weights * (1 + waits / self.stages)
        grid = _grid(np.concatenate([weights, spread]), self.splits)
        groups = [self._group(np.flatnonzero(self.group_of == g), grid, energy_weight) for g in range(self._num_groups)]
        missing = self._missing_bytes()
        bottleneck = self._pay(groups, grid, weights, missing) + weights * waits * self._slowest()
        levels: Array = np.maximum(self._pay(groups, grid, spread, missing), bottleneck)
        return levels

    @property
    def _num_groups(self) -> int:
        return int(self.splits.shape[1])

    def _group(self, nodes: Index, grid: Array, energy_weight: float) -> _Group:
        base = self.base
        own, shared = base.count[nodes, :-1].sum(axis=1), base.count[nodes, -1]
        least = np.zeros((len(nodes), len(grid)))
        again = np.zeros((len(nodes), len(grid)))
        for clock in range(self.span.start, self.span.stop):
            paid = grid * base.time_s[clock, nodes, None] + energy_weight * base.energy_j[clock, nodes, None]
            redone = grid * base.redo_s[clock, nodes, None] + energy_weight * base.redo_j[clock, nodes, None]
            first = clock == self.span.start
            least = paid if first else np.minimum(least, paid)
            again = redone if first else np.minimum(again, redone)
        return _Group(own @ least, shared @ least, own @ again, self.classes[nodes].T @ again)

    def _pay(self, groups: Sequence[_Group], grid: Array, weights: Array, missing: Array) -> Array:
        """Least weight * (seconds of all stages) + energy, what memory makes them redo included."""
        total = np.zeros(len(weights))
        full, mixed = self.mode == FULL, (self.mode == MIXED) & (missing > 0) & np.isfinite(missing)
        redone = np.zeros((self.classes.shape[1], int(mixed.sum())))
        for g, group in enumerate(groups):
            at = weights / self.splits[self.mesh, g]
            total += np.interp(at, grid, group.own) + self.stages * np.interp(at, grid, group.shared)
            total[full] += np.interp(at[full], grid, group.again)
            for c, again in enumerate(group.again_by_class):
                redone[c] += np.interp(at[mixed], grid, again)
        saved = self._per_class(self.base.kept_bytes - self.base.boundary_bytes)
        saves = saved > 0
        if saves.any():
            total[mixed] += missing[mixed] * (redone[saves] / saved[saves, None]).min(axis=0)
        total[np.isinf(missing)] = np.inf
        return total

    def _per_class(self, values: Array) -> Array:
        """[class], sum over the nodes of one block."""
        found: Array = values @ self.classes
        return found

    def _missing_bytes(self) -> Array:
        """Bytes (all devices of all stages) that recompute must save; inf where nothing fits."""
        base = self.base
        own = base.count[:, :-1].sum(axis=1)
        blocks = np.bincount(self.class_of, minlength=self.classes.shape[1])
        kept, least = (self._per_class(b) for b in (base.kept_bytes, base.boundary_bytes))
        state = float(base.state_bytes @ own) + self.stages * float(base.state_bytes @ base.count[:, -1])
        room = self.devices * self.source.memory_bytes
        inverse, most = self._in_flight()
        spare = np.minimum(self.stages * room - state, room * inverse - state / most)
        most_kept = float(kept @ blocks)
        full = np.where(self.mode == FULL, float(least @ blocks), most_kept)
        saved = np.where(self.mode == MIXED, float(np.maximum(kept - least, 0.0) @ blocks), 0.0)
        slack = 1e-9 * self.stages * room
        missing = full - spare
        return np.where(missing > saved + slack, np.inf, np.where(missing > slack, missing, 0.0))

    def _in_flight(self) -> tuple[Array, Array]:
        """Per skeleton: sum over stages of 1 / microbatches in flight, and the most in flight."""
        found = {}
        for stages in np.unique(self.stages).tolist():
            flight = [microbatches_in_flight(k, stages, self.count, self.source.schedule) for k in range(stages)]
            found[stages] = sum(1 / h for h in flight), float(max(flight))
        both = np.array([found[stages] for stages in self.stages.tolist()]).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def _slowest(self) -> Array:
        """Least seconds of the slowest stage, per skeleton."""
        slowest = np.zeros(len(self.stages))
        blocks, shared = self._block_seconds(self.base.time_s[self.span.start])
        again = self._block_seconds(self.base.redo_s[self.span.start])[0]
        for seconds, rows in ((blocks, self.mode != FULL), (blocks + again, self.mode == FULL)):
            order = -np.sort(-seconds, axis=1)
            average = seconds.sum(axis=1)
            for stages in np.unique(self.stages[rows]).tolist():
                here = np.flatnonzero(rows & (self.stages == stages))
                full = np.ceil(np.arange(1, order.shape[1] + 1) / stages)
                least = np.maximum((order * full).max(axis=1), average / stages)
                slowest[here] = (least + shared)[self.mesh[here]]
        return slowest

    def _block_seconds(self, seconds: Array) -> tuple[Array, Array]:
        """[mesh, block] and [mesh] for shared nodes: least seconds of one microbatch."""
        by_group = np.stack([seconds[self.group_of == g] @ self.base.count[self.group_of == g] for g in self._groups])
        found = (1 / self.splits) @ by_group
        return found[:, :-1], found[:, -1]

    @property
    def _groups(self) -> range:
        return range(self._num_groups)


NONE, FULL, MIXED = range(3)


def _grid(weights: Array, splits: Array) -> Array:
    """Weights from the least to the largest that are asked for; 0 alone if none is positive."""
    high = float(weights.max(initial=0.0))
    if high <= 0:
        return np.zeros(1)
    low = float(weights[weights > 0].min()) / float(splits.max(initial=1.0))
    return np.concatenate([[0.0], np.geomspace(low * (1 - 1e-12), high * (1 + 1e-12), GRID)])


@dataclass
class Waiting:
    """Skeletons in ascending order of a first bound; only those taken are made."""

    skeletons: Skeletons
    levels: Array
    order: Index
    taken: int = 0

    def least(self) -> float:
        """Bound of the next one, inf if there is none or nothing fits it."""
        return float(self.levels[self.order[self.taken]]) if self.taken < len(self.order) else math.inf

    def take(self) -> tuple[float, Skeleton]:
        """The next one with its bound."""
        index = int(self.order[self.taken])
        self.taken += 1
        return float(self.levels[index]), self.skeletons[index]

    def rest(self) -> dict[Skeleton, float]:
        """Of those not taken, the one of least bound for each number of stages."""
        left = self.order[self.taken :]
        _, first = np.unique(self.skeletons.stages[left], return_index=True)
        return {self.skeletons[int(i)]: float(self.levels[i]) for i in left[first]}


def waiting(skeletons: Skeletons, levels: Array) -> Waiting:
    return Waiting(skeletons, levels, np.argsort(levels, kind="stable"))
