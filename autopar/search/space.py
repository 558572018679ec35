"""Space: the skeletons (stage mesh, number of stages, microbatches, recompute mode) that are searched.

A skeleton has K stages of the same mesh: 1-D `(n,)` or 2-D `(d, t)` with d, t >= 2, every factorisation, K n <= the
number of devices (equal under `use_all`), K <= number of blocks. Pinned `dp`/`tp` make the mesh `(dp, tp)`. Above
`EVERY_SIZE_LIMIT` devices, axes whose size divides no dim of any op are left out: nothing can split over them, so the
mesh without such an axis does the same in the same time on fewer devices.

Microbatches M: divisors of the batch, thinned so that each kept one is at least 1.5 times the one before (all
divisors of a power of two stay), at most `max_microbatches` (default 128). A table of None drops the skeleton.

Recompute mode: `none`, `full` (all stages), or `mixed` (at least one stage of each kind; K >= 2).

`IdealBound` bounds a skeleton from one-device tables alone. It assumes that a shard of 1/n of an op (or a microbatch
of 1/n of the samples) takes at least 1/n of its time and energy, and that an axis whose size divides no dim of an op
splits nothing. It is used only where more than `FEW_TABLES` tables would be needed; below that no assumption is made.
Every table that is made is held against it, and where one contradicts it the search starts again with the bounds
scaled down by the ratio seen (`stages`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autopar.errors import InputError
from autopar.ir.cost import Array, TableSource
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh, stage_mesh
from autopar.ir.solution import Pins

DEFAULT_MAX_MICROBATCHES = 128
MICROBATCH_RATIO = 1.5
FEW_TABLES = 24
EVERY_SIZE_LIMIT = 16
MODES = {"none": (False,), "full": (True,), "mixed": (False, True)}


@dataclass(frozen=True, order=True)
class Skeleton:
    """One corner of the space; `order` makes ties deterministic.

    `clocks` is a range, first to last inclusive, of indices into the source's `clocks_hz`: all stages run at one of
    them. A range of one is a leaf; a longer one stands for all its leaves and is split by the search.
    """

    num_stages: int
    sizes: tuple[int, ...]
    num_microbatches: int
    mode: str
    clocks: tuple[int, int] = (0, 0)

    @property
    def mesh(self) -> StageMesh:
        return stage_mesh(*self.sizes)

    @property
    def num_gpus(self) -> int:
        return self.num_stages * math.prod(self.sizes)

    def describe(self) -> str:
        mesh = " x ".join(f"{axis.name}={axis.size}" for axis in self.mesh.axes)
        return f"{mesh}, pp={self.num_stages}, microbatches={self.num_microbatches}, recompute={self.mode}"


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


def mesh_sizes(num_devices: int, pins: Pins) -> Iterator[tuple[int, ...]]:
    """Every mesh of exactly `num_devices` devices that the pins allow."""
    if pins.dp is not None or pins.tp is not None:
        for d in range(1, num_devices + 1):
            if num_devices % d == 0 and pins.dp in (None, d) and pins.tp in (None, num_devices // d):
                yield d, num_devices // d
        return
    yield (num_devices,)
    for d in range(2, num_devices // 2 + 1):
        if num_devices % d == 0:
            yield d, num_devices // d


def useful_sizes(graph: OpGraph, limit: int) -> tuple[int, ...]:
    """Axis sizes up to `limit` that divide some dim of some op, ascending, 1 first."""
    dims = {dim for dims in _dims_by_op(graph).values() for dim in dims}
    return (1, *(size for size in range(2, limit + 1) if any(dim % size == 0 for dim in dims)))


def _useful_meshes(sizes: tuple[int, ...], limit: int) -> Iterator[tuple[int, ...]]:
    """Meshes of useful axes with at most `limit` devices, by number of devices."""
    flat = [(n,) for n in sizes if n <= limit]
    square = [(d, t) for d in sizes[1:] for t in sizes[1:] if d * t <= limit]
    yield from sorted([*flat, *square], key=lambda mesh: (math.prod(mesh), mesh))


def _meshes(graph: OpGraph, limit: int, pins: Pins, *, exactly: bool) -> Iterator[tuple[int, ...]]:
    """Stage meshes of at most (or exactly) `limit` devices."""
    is_free = pins.dp is None and pins.tp is None
    if is_free and not exactly and limit > EVERY_SIZE_LIMIT:
        yield from _useful_meshes(useful_sizes(graph, limit), limit)
        return
    for num_devices in range(limit if exactly else 1, limit + 1):
        yield from mesh_sizes(num_devices, pins)


def list_skeletons(
    source: TableSource,
    pins: Pins,
    *,
    use_all: bool,
    max_microbatches: int | None,
    clocks: tuple[int, int] = (0, 0),
) -> tuple[Skeleton, ...]:
    """All skeletons in a fixed order, each with the whole range of `clocks`.

    Raises:
        InputError: if the pins ask for more devices, stages or microbatches than there are.
    """
    num_gpus, num_blocks = source.device.num_gpus, len(source.graph.blocks)
    counts = microbatch_counts(source.graph.batch_size, max_microbatches, pins.num_microbatches)
    if pins.dp is not None and source.graph.batch_size % pins.dp:
        raise InputError(f"the batch of {source.graph.batch_size} samples does not divide over dp={pins.dp}")
    stages = [pins.pp] if pins.pp is not None else range(1, min(num_blocks, num_gpus) + 1)
    found = []
    for num_stages in stages:
        if use_all and num_gpus % num_stages:
            continue
        modes = [pins.recompute] if pins.recompute else ["none", "full", "mixed"][: 2 + (num_stages > 1)]
        for sizes in _meshes(source.graph, num_gpus // num_stages, pins, exactly=use_all):
            found += [Skeleton(num_stages, sizes, count, mode, clocks) for count in counts for mode in modes]
    if not found:
        raise InputError(_empty_space(num_gpus, pins, use_all=use_all))
    if pins.pp is not None and pins.pp > num_blocks:
        raise InputError(f"pp={pins.pp}, but the model has only {num_blocks} blocks to put on stages")
    return tuple(found)


def _empty_space(num_gpus: int, pins: Pins, *, use_all: bool) -> str:
    asked = [f"{n}={getattr(pins, n)}" for n in ("dp", "tp", "pp") if getattr(pins, n) is not None]
    exactly = "exactly " if use_all else "at most "
    return f"no mesh with {', '.join(asked) or 'these settings'} uses {exactly}{num_gpus} GPUs"


class IdealBound:
    """Per-block time, energy and state of perfect splits; see the module docstring.

    `blocks(sizes, M, clocks)` gives [3, num_blocks + 1]: loaded seconds of one stage device at the first clock, joules
    of a step over all devices at the last, state bytes of one device; the last column is shared entries.
    """

    def __init__(self, source: TableSource) -> None:
        self._source = source
        self._dims = _dims_by_op(source.graph)
        self._base: dict[tuple[int, int], tuple[Array, Array, list[str]] | None] = {}
        self._splits: dict[tuple[int, ...], Array] = {}
        self._blocks: dict[tuple[tuple[int, ...], int, tuple[int, int]], Array | None] = {}

    def blocks(self, sizes: tuple[int, ...], num_microbatches: int, clocks: tuple[int, int] = (0, 0)) -> Array | None:
        """None where even one device has no table."""
        key = (sizes, num_microbatches, clocks)
        if key not in self._blocks:
            self._blocks[key] = self._make(sizes, num_microbatches, clocks)
        return self._blocks[key]

    def _make(self, sizes: tuple[int, ...], num_microbatches: int, clocks: tuple[int, int]) -> Array | None:
        fast, slow = (self._one_device(num_microbatches, clock) for clock in clocks)
        if fast is None or slow is None:
            return None
        values, count, names = fast
        values = np.array([values[0], slow[0][1], values[2]])
        num_devices = math.prod(sizes)
        if sizes not in self._splits:
            self._splits[sizes] = np.array([self._split(name, sizes) for name in names], dtype=np.float64)
        rows = np.array([values[0] / self._splits[sizes], values[1], values[2] / num_devices])
        result: Array = rows @ count
        return result

    def _split(self, name: str, sizes: tuple[int, ...]) -> int:
        dims = self._dims.get(name)
        if dims is None:
            return math.prod(sizes)
        return math.prod(size for size in sizes if any(dim % size == 0 for dim in dims))

    def _one_device(self, num_microbatches: int, clock: int) -> tuple[Array, Array, list[str]] | None:
        key = (num_microbatches, clock)
        if key not in self._base:
            table = self._source.table(stage_mesh(1), num_microbatches, clock)
            if table is None:
                self._base[key] = None
                return None
            count = np.zeros((len(table.nodes), table.num_blocks + 1))
            for row, node in enumerate(table.nodes):
                np.add.at(count[row], list(node.blocks), 1.0)
            values = np.array(
                [
                    [np.min(n.forward_s + n.backward_s + n.step_s / num_microbatches) for n in table.nodes],
                    [np.min(num_microbatches * n.microbatch_j + n.step_j) for n in table.nodes],
                    [np.min(n.state_bytes) for n in table.nodes],
                ]
            )
            self._base[key] = values, count, [n.name for n in table.nodes]
        return self._base[key]


def _dims_by_op(graph: OpGraph) -> dict[str, frozenset[int]]:
    """Sizes of all dims that each op touches."""
    return {
        op.name: frozenset(
            dim for name in (*op.inputs, *op.outputs) for dim in graph.values[name].meta.shape if dim > 1
        )
        for op in graph.ops
    }
