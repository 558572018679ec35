"""Space: the skeletons (stage mesh, number of stages, microbatches, recompute mode) that are searched.

A skeleton has K stages of the same mesh: 1-D `(n,)` or 2-D `(d, t)` with d, t >= 2, every factorisation, K n <= the
number of devices (equal under `use_all`), K <= number of blocks. Pinned `dp`/`tp` and `roles` make the mesh
`(dp, tp)`; `roles` leave out sizes of dp that do not divide the batch. Above `EVERY_SIZE_LIMIT` devices, axes whose
size divides no dim of any op are left out: nothing can split over them, so the
mesh without such an axis does the same in the same time on fewer devices.

Microbatches M: divisors of the batch, thinned so that each kept one is at least 1.5 times the one before (all
divisors of a power of two stay), at most `max_microbatches` (default 128). A table of None drops the skeleton.

Recompute mode: `none`, `full` (all stages), or `mixed` (at least one stage of each kind; K >= 2).

On a mixed cluster (`ir.mixed`) a skeleton also says on which type each stage lies.

`IdealBound` bounds a skeleton from one-device tables alone. It assumes that a shard of 1/n of an op (or a microbatch
of 1/n of the samples) takes at least 1/n of its time and energy, and that an axis whose size divides no dim of an op
splits nothing. It is used only where more than `FEW_TABLES` tables would be needed; below that no assumption is made.
Every table that is made is held against it, and where one contradicts it the search starts again with the bounds
scaled down by the ratio seen (`stages`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError
from autopar.ir.cost import Array, TableSource
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh, stage_mesh
from autopar.ir.mixed import MixedSource
from autopar.ir.pipeline import check_zero_bubble
from autopar.ir.solution import Pins
from autopar.search.evaluate import redo_share

DEFAULT_MAX_MICROBATCHES = 128
MICROBATCH_RATIO = 1.5
FEW_TABLES = 24
EVERY_SIZE_LIMIT = 16
MODES = {"none": (False,), "full": (True,), "mixed": (False, True)}
MODE_NAMES = tuple(MODES)

Index = NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Skeleton:
    """One corner of the space; `order` makes ties deterministic.

    `clocks` is a range, first to last inclusive, of indices into the source's `clocks_hz`: all stages run at one of
    them. A range of one is a leaf; a longer one stands for all its leaves and is split by the search. `kinds` are the
    types of the stages on a mixed cluster, else ().
    """

    num_stages: int
    sizes: tuple[int, ...]
    num_microbatches: int
    mode: str
    clocks: tuple[int, int] = (0, 0)
    kinds: tuple[int, ...] = ()

    @property
    def mesh(self) -> StageMesh:
        return stage_mesh(*self.sizes)

    @property
    def num_gpus(self) -> int:
        return self.num_stages * math.prod(self.sizes)

    def describe(self, names: Sequence[str] = ()) -> str:
        """In words; `names` are those of the types."""
        mesh = " x ".join(f"{axis.name}={axis.size}" for axis in self.mesh.axes)
        runs = [(names[kind], len(list(same))) for kind, same in itertools.groupby(self.kinds if names else ())]
        types = "".join(f", {count} on {name}" for name, count in runs)
        return f"{mesh}, pp={self.num_stages}, microbatches={self.num_microbatches}, recompute={self.mode}{types}"


def microbatch_counts(batch_size: int, max_microbatches: int | None, pinned: int | None) -> tuple[int, ...]:
    """Values of M; see the module docstring.

    Raises:
        InputError: if the pinned M does not divide the batch.
    """
    if pinned is not None:
        if pinned < 1 or batch_size % pinned:
            raise InputError(f"{pinned} microbatches do not divide the batch of {batch_size} samples")
        return (pinned,)
    limit = min(batch_size, max_microbatches or DEFAULT_MAX_MICROBATCHES)
    kept = [1]
    for candidate in range(2, limit + 1):
        if batch_size % candidate == 0 and candidate >= MICROBATCH_RATIO * kept[-1]:
            kept.append(candidate)
    return tuple(kept)


def has_free_mesh(pins: Pins) -> bool:
    """Whether meshes are those of the search, and not (dp, tp) as pinned."""
    return pins.dp is None and pins.tp is None and not pins.roles


def mesh_sizes(num_devices: int, pins: Pins) -> Iterator[tuple[int, ...]]:
    """Every mesh of exactly `num_devices` devices that the pins allow."""
    if not has_free_mesh(pins):
        for d in range(1, num_devices + 1):
            if num_devices % d == 0 and pins.dp in (None, d) and num_devices % (d * (pins.cp or 1)) == 0:
                sizes = _pinned_sizes(d, num_devices // d // (pins.cp or 1), pins)
                yield from [sizes] if sizes is not None and pins.tp in (None, sizes[-1]) else []
        return
    yield (num_devices,)
    for d in range(2, num_devices // 2 + 1):
        if num_devices % d == 0:
            yield d, num_devices // d


def _pinned_sizes(d: int, t: int, pins: Pins) -> tuple[int, ...] | None:
    """The mesh of d ways to split samples and t of tensor parallelism; experts are spread over some of the d."""
    if pins.cp is None and pins.ep is None:
        return d, t
    ep = pins.ep or 1
    return (d // ep, ep, pins.cp or 1, t) if d % ep == 0 else None


@dataclass(frozen=True)
class Skeletons(Sequence[Skeleton]):
    """Skeletons as arrays, each made when it is asked for; all with the same range of clocks.

    Attributes:
        meshes: every mesh that occurs.
        stages, mesh_index, counts, modes, kinds_index: [skeleton]; modes are positions in `MODES`.
        types: every sequence of types of stages that occurs; () alone where there is one type.
    """

    meshes: tuple[tuple[int, ...], ...]
    stages: Index
    mesh_index: Index
    counts: Index
    modes: Index
    kinds_index: Index
    clocks: tuple[int, int]
    types: tuple[tuple[int, ...], ...] = ((),)

    def __len__(self) -> int:
        return len(self.stages)

    @overload
    def __getitem__(self, index: int) -> Skeleton: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Skeleton, ...]: ...

    def __getitem__(self, index: int | slice) -> Skeleton | tuple[Skeleton, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        sizes, count = self.meshes[self.mesh_index[index]], int(self.counts[index])
        kinds = self.types[self.kinds_index[index]]
        return Skeleton(int(self.stages[index]), sizes, count, MODE_NAMES[self.modes[index]], self.clocks, kinds)

    def only(self, keep: Callable[[Skeleton], bool]) -> Skeletons:
        """Those that pass a test."""
        kept = np.array([i for i, skeleton in enumerate(self) if keep(skeleton)], dtype=np.int64)
        arrays = (self.stages[kept], self.mesh_index[kept], self.counts[kept], self.modes[kept], self.kinds_index[kept])
        return Skeletons(self.meshes, *arrays, self.clocks, self.types)

    @property
    def num_tables(self) -> int:
        """Distinct (mesh, microbatches)."""
        return len(np.unique(self.mesh_index * (int(self.counts.max(initial=0)) + 1) + self.counts))


def useful_sizes(graph: OpGraph, limit: int) -> tuple[int, ...]:
    """Axis sizes up to `limit` that divide some dim of some op, ascending, 1 first."""
    dims = np.array(sorted({dim for dims in _dims_by_op(graph).values() for dim in dims}), dtype=np.int64)
    sizes = np.arange(2, min(limit, int(dims.max(initial=1))) + 1)
    divides = np.zeros(len(sizes), dtype=np.bool_)
    for dim in dims.tolist():
        divides |= dim % sizes == 0
    return (1, *sizes[divides].tolist())


def _useful_meshes(sizes: tuple[int, ...], limit: int) -> Iterator[tuple[int, ...]]:
    """Meshes of useful axes with at most `limit` devices, by number of devices."""
    flat = [(n,) for n in sizes if n <= limit]
    square = [(d, t) for d in sizes[1:] for t in sizes[1:] if d * t <= limit]
    yield from sorted([*flat, *square], key=lambda mesh: (math.prod(mesh), mesh))


def _meshes(
    useful: tuple[int, ...], limit: int, batch_size: int, pins: Pins, *, exactly: bool
) -> Iterator[tuple[int, ...]]:
    """Stage meshes of at most (or exactly) `limit` devices; `useful` are axis sizes that split something."""
    if has_free_mesh(pins) and not exactly and limit > EVERY_SIZE_LIMIT:
        yield from _useful_meshes(useful, limit)
        return
    for num_devices in range(limit if exactly else 1, limit + 1):
        for sizes in mesh_sizes(num_devices, pins):
            if not pins.roles or (batch_size % sizes[0] == 0 and sizes[-1] in useful):
                yield sizes


def list_skeletons(
    source: TableSource,
    pins: Pins,
    *,
    use_all: bool,
    max_microbatches: int | None,
    clocks: tuple[int, int] = (0, 0),
) -> Skeletons:
    """All skeletons in a fixed order, each with the whole range of `clocks`.

    Raises:
        InputError: if the pins ask for more devices, stages or microbatches than there are.
    """
    num_gpus, num_blocks = source.device.num_gpus, len(source.graph.blocks)
    counts = microbatch_counts(source.graph.batch_size, max_microbatches, pins.num_microbatches)
    if pins.dp is not None and source.graph.batch_size % pins.dp:
        raise InputError(f"the batch of {source.graph.batch_size} samples does not divide over dp={pins.dp}")
    stages = [pins.pp] if pins.pp is not None else range(1, min(num_blocks, num_gpus) + 1)
    found: list[tuple[int, int, int, int, int]] = []
    useful, index = useful_sizes(source.graph, num_gpus), dict[tuple[int, ...], int]()
    types: dict[tuple[int, ...], int] = {} if isinstance(source, MixedSource) else {(): 0}
    for num_stages in stages:
        if use_all and num_gpus % num_stages:
            continue
        names = [pins.recompute] if pins.recompute else MODE_NAMES[: 2 + (num_stages > 1)]
        limit = num_gpus // num_stages
        runs = [count for count in counts if _runs(pins.schedule, num_stages, count)]
        rest = [(count, MODE_NAMES.index(name)) for count in runs for name in names]
        for sizes in _meshes(useful, limit, source.graph.batch_size, pins, exactly=use_all):
            mesh = index.setdefault(sizes, len(index))
            if isinstance(source, MixedSource):
                every = [types.setdefault(t, len(types)) for t in source.arrangements(num_stages, math.prod(sizes))]
                found += [(num_stages, mesh, *pair, kinds) for pair in rest for kinds in every]
            else:
                found += [(num_stages, mesh, *pair, 0) for pair in rest]
    if not found:
        if pins.schedule is not None and pins.pp is not None and pins.num_microbatches is not None:
            _check_pinned(pins.schedule, pins.pp, pins.num_microbatches)
        raise InputError(_empty_space(num_gpus, pins, use_all=use_all))
    if pins.pp is not None and pins.pp > num_blocks:
        raise InputError(f"pp={pins.pp}, but the model has only {num_blocks} blocks to put on stages")
    num_stages_of, mesh_of, count_of, mode_of, kinds_of = np.array(found, dtype=np.int64).T
    return Skeletons(tuple(index), num_stages_of, mesh_of, count_of, mode_of, kinds_of, clocks, tuple(types))


def _runs(schedule: str | None, num_stages: int, num_microbatches: int) -> bool:
    """Whether there is such a schedule."""
    try:
        check_zero_bubble(num_stages, num_microbatches, schedule or "1f1b")
    except ValueError:
        return False
    return True


def _check_pinned(schedule: str, num_stages: int, num_microbatches: int) -> None:
    try:
        check_zero_bubble(num_stages, num_microbatches, schedule)
    except ValueError as error:
        raise InputError(str(error)) from None


def _empty_space(num_gpus: int, pins: Pins, *, use_all: bool) -> str:
    asked = [f"{n}={getattr(pins, n)}" for n in ("dp", "tp", "pp", "ep", "cp") if getattr(pins, n) is not None]
    exactly = "exactly " if use_all else "at most "
    return f"no mesh with {', '.join(asked) or 'these settings'} uses {exactly}{num_gpus} GPUs"


@dataclass(frozen=True)
class OneDevice:
    """Least figures of nodes on one device: seconds [clock, node] of a microbatch, joules of a step, and bytes.

    Attributes:
        redo_s, redo_j: [clock, node], what full recompute adds; 0 for shared nodes.
        kept_bytes, boundary_bytes: kept of one microbatch without recompute and with it; 0 for shared nodes.
        count: [node, block], how often each block has it; the last column is for shared nodes.
    """

    names: tuple[str, ...]
    time_s: Array
    energy_j: Array
    redo_s: Array
    redo_j: Array
    kept_bytes: Array
    boundary_bytes: Array
    state_bytes: Array
    count: Array


class IdealBound:
    """Bounds of perfect splits, from one-device tables; see the module docstring."""

    def __init__(self, source: TableSource) -> None:
        self._source = source
        self._dims = _dims_by_op(source.graph)
        self._base: dict[int, OneDevice | None] = {}
        self._splits: dict[tuple[tuple[int, ...], tuple[str, ...]], Array] = {}
        self._slowest: dict[tuple[tuple[int, ...], int, int, int], float] = {}
        self._paid: dict[tuple[object, ...], float] = {}

    def fits(self, skeleton: Skeleton, memory_bytes: float) -> bool:
        """Whether the state alone fits; False too where even one device has no table."""
        base = self.one_device(skeleton.num_microbatches)
        if base is None:
            return False
        num_devices, stages = math.prod(skeleton.sizes), skeleton.num_stages
        return float(base.state_bytes @ _present(base, stages)) <= num_devices * stages * memory_bytes

    def pay(self, skeleton: Skeleton, time_weight: float, energy_weight: float) -> float:
        """Least time_weight * (seconds of all stages) + energy_weight * joules, every node at its best clock."""
        where = (skeleton.num_stages, skeleton.sizes, skeleton.num_microbatches, skeleton.clocks)
        key = (*where, skeleton.mode == "full", time_weight, energy_weight)
        if key not in self._paid:
            base = self.one_device(skeleton.num_microbatches)
            if base is None:
                return math.inf
            span = slice(skeleton.clocks[0], skeleton.clocks[1] + 1)
            split, again = self.split(skeleton.sizes, base), 1.0 if skeleton.mode == "full" else 0.0
            seconds = time_weight * (base.time_s[span] + again * base.redo_s[span]) / split
            least = (seconds + energy_weight * (base.energy_j[span] + again * base.redo_j[span])).min(axis=0)
            self._paid[key] = float(least @ _present(base, skeleton.num_stages))
        return self._paid[key]

    def slowest_s(self, skeleton: Skeleton) -> float:
        """Least seconds of the slowest stage, at the highest clock of the range."""
        key = (skeleton.sizes, skeleton.num_microbatches, skeleton.num_stages, skeleton.clocks[0])
        if key not in self._slowest:
            base = self.one_device(skeleton.num_microbatches)
            if base is None:
                return math.inf
            blocks = (base.time_s[skeleton.clocks[0]] / self.split(skeleton.sizes, base)) @ base.count
            self._slowest[key] = least_bottleneck(blocks, skeleton.num_stages)
        return self._slowest[key]

    def node_figures(self, skeleton: Skeleton) -> tuple[Array, Array, Array] | None:
        """Least seconds and joules of every node at the highest clock, and [node, block] how often it occurs."""
        base = self.one_device(skeleton.num_microbatches)
        if base is None:
            return None
        again = 1.0 if skeleton.mode == "full" else 0.0
        seconds = (base.time_s[0] + again * base.redo_s[0]) / self.split(skeleton.sizes, base)
        return seconds, base.energy_j[0] + again * base.redo_j[0], base.count

    def split(self, sizes: tuple[int, ...], base: OneDevice) -> Array:
        """[node], into how many parts a mesh splits each."""
        key = (sizes, base.names)
        if key not in self._splits:
            self._splits[key] = np.array([self._parts(name, sizes) for name in base.names], dtype=np.float64)
        return self._splits[key]

    def _parts(self, name: str, sizes: tuple[int, ...]) -> int:
        dims = self._dims.get(name)
        if dims is None:
            return math.prod(sizes)
        return math.prod(size for size in sizes if any(dim % size == 0 for dim in dims))

    def one_device(self, num_microbatches: int) -> OneDevice | None:
        """Least figures of nodes, or None where one device has no table."""
        if num_microbatches not in self._base:
            self._base[num_microbatches] = self._make(num_microbatches)
        return self._base[num_microbatches]

    def _make(self, num_microbatches: int) -> OneDevice | None:
        table = self._source.table(stage_mesh(1), num_microbatches)
        figures = None if table is None else self._source.clock_figures(stage_mesh(1), num_microbatches)
        if table is None or figures is None:
            return None
        count = np.zeros((len(table.nodes), table.num_blocks + 1))
        for row, node in enumerate(table.nodes):
            np.add.at(count[row], list(node.blocks), 1.0)
        starts = np.concatenate([[0], np.cumsum([len(node.choices) for node in table.nodes])])[:-1]
        seconds = (
            figures.forward_s
            + figures.backward_s
            + np.concatenate([node.step_s / num_microbatches for node in table.nodes])
        )
        moving = num_microbatches * figures.microbatch_j
        joules = moving + np.concatenate([node.step_j for node in table.nodes])
        redo_j = moving * redo_share(figures.forward_s, figures.backward_s)
        is_own = np.array([node.blocks[0] >= 0 for node in table.nodes])

        def least(values: Array) -> Array:
            found: Array = np.minimum.reduceat(values, starts, axis=-1)
            return found

        return OneDevice(
            tuple(node.name for node in table.nodes),
            least(seconds),
            least(joules),
            least(figures.forward_s) * is_own,
            least(redo_j) * is_own,
            np.array([np.min(node.activation_bytes) for node in table.nodes]) * is_own,
            np.array([np.min(node.boundary_bytes) for node in table.nodes]) * is_own,
            np.array([np.min(node.state_bytes) for node in table.nodes]),
            count,
        )


def _present(base: OneDevice, num_stages: int) -> Array:
    """How often each node is paid by all stages together."""
    paid: Array = base.count[:, :-1].sum(axis=1) + num_stages * base.count[:, -1]
    return paid


def least_bottleneck(minima: Array, num_stages: int) -> float:
    """tau*: the smallest possible largest stage; `minima` per block, the shared part last."""
    per_block, shared = minima[:-1], float(minima[-1])
    prefix = np.concatenate([[0.0], np.cumsum(per_block)])
    interval = prefix[None, :] - prefix[:-1, None]
    interval[np.tril_indices(len(per_block), 0, len(prefix))] = np.inf
    rest = np.append(np.full(len(per_block), np.inf), 0.0)
    for _ in range(num_stages):
        rest = np.append(np.maximum(interval, rest).min(axis=1), np.inf)
    return float(rest[0]) + shared


def _dims_by_op(graph: OpGraph) -> dict[str, frozenset[int]]:
    """Sizes of all dims that each op touches."""
    return {
        op.name: frozenset(
            dim for name in (*op.inputs, *op.outputs) for dim in graph.values[name].meta.shape if dim > 1
        )
        for op in graph.ops
    }
