"""Mixed clusters: several types of device, one source of tables per type.

Every stage of a plan lies on one type, stages of a type follow one another along the pipeline, and the types used may
come in any order. A type of c devices hosts at most c // n stages of n. Shardings are the same in all stages, so the
tables of all types have the same nodes, edges and choices, and differ in times, energies and links alone.

Seen as a `TableSource`, a mixed cluster is its envelope: every figure is the least over all types, and its device has
the most memory and draws the least. What needs no more than a bound, or than memory (which does not depend on the
type), reads that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autopar.ir.cost import ClockFigures, CostEdge, CostNode, CostTable, Device, Link, TableSource
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh, stage_mesh

NODE_FIGURES = ("forward_s", "backward_s", "step_s", "microbatch_j", "step_j")
EDGE_FIGURES = ("forward_s", "backward_s", "microbatch_j")


@dataclass(frozen=True)
class MixedDevice:
    """The envelope of several types: implements `ir.cost.Device`."""

    parts: tuple[Device, ...]

    @property
    def memory_bytes(self) -> int:
        return max(part.memory_bytes for part in self.parts)

    @property
    def blocked_w(self) -> float:
        return min(part.blocked_w for part in self.parts)

    @property
    def host_w_per_node(self) -> float:
        return min(part.host_w_per_node for part in self.parts)

    @property
    def num_gpus(self) -> int:
        return sum(part.num_gpus for part in self.parts)

    @property
    def gpus_per_node(self) -> int:
        return max(part.gpus_per_node for part in self.parts)


@dataclass(frozen=True)
class MixedSource:
    """Implements `ir.cost.TableSource` as the envelope of its parts.

    Attributes:
        names: of the types.
        parts: one source per type, over the same graph; they are used at their highest clock.
        links: (type, other type) in both orders: the link between neighbouring stages of different types.
    """

    names: tuple[str, ...]
    parts: tuple[TableSource, ...]
    links: Mapping[tuple[int, int], Link]

    @property
    def graph(self) -> OpGraph:
        return self.parts[0].graph

    @property
    def device(self) -> MixedDevice:
        return MixedDevice(tuple(part.device for part in self.parts))

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return (max(part.clocks_hz[0] for part in self.parts),)

    @cached_property
    def speeds(self) -> tuple[float, ...]:
        """How fast the types are beside one another: inverse seconds of the whole batch on one device."""
        tables = self.tables(stage_mesh(1), 1)
        if tables is None:
            return (1.0,) * len(self.parts)
        seconds = [
            sum(len(n.blocks) * float(np.min(n.forward_s + n.backward_s + n.step_s)) for n in t.nodes) for t in tables
        ]
        return tuple(1 / s if s > 0 else 1.0 for s in seconds)

    def tables(self, mesh: StageMesh, num_microbatches: int) -> tuple[CostTable, ...] | None:
        """The table of every type."""
        found = [part.table(mesh, num_microbatches) for part in self.parts]
        made = tuple(table for table in found if table is not None)
        return made if len(made) == len(found) else None

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        """The envelope."""
        tables = self.tables(mesh, num_microbatches)
        return None if tables is None else envelope(tables, tuple(self.links.values()))

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        """The envelope's own figures: there is one clock."""
        table = self.table(mesh, num_microbatches)
        if table is None:
            return None
        names = ("forward_s", "backward_s", "microbatch_j")
        return ClockFigures(*(np.concatenate([getattr(node, name) for node in table.nodes])[None] for name in names))

    def arrangements(self, num_stages: int, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """Types of the stages, from the input, in every order in which they may stand."""
        room = [part.device.num_gpus // num_devices for part in self.parts]
        return arrangements(num_stages, room)

    def fixed_w(self, kinds: Sequence[int], num_devices: int) -> float:
        """Blocked power of the devices of these stages and power of their hosts, watts."""
        total = 0.0
        for kind in sorted(set(kinds)):
            device, used = self.parts[kind].device, kinds.count(kind) * num_devices
            total += device.blocked_w * used + device.host_w_per_node * -(-used // device.gpus_per_node)
        return total

    def memory_bytes(self, kinds: Sequence[int]) -> tuple[float, ...]:
        """Usable memory of one device of every stage."""
        return tuple(float(self.parts[kind].device.memory_bytes) for kind in kinds)


def arrangements(num_stages: int, room: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Every sequence of types of `num_stages` stages with at most room[kind] of each, all of a type together."""
    found = []
    for count in range(1, min(len(room), num_stages) + 1):
        for order in itertools.permutations(range(len(room)), count):
            for cuts in itertools.combinations(range(1, num_stages), count - 1):
                lengths = [stop - start for start, stop in itertools.pairwise((0, *cuts, num_stages))]
                if all(length <= room[kind] for kind, length in zip(order, lengths, strict=True)):
                    found.append(tuple(k for k, length in zip(order, lengths, strict=True) for _ in range(length)))
    return tuple(found)


def same_structure(tables: Sequence[CostTable]) -> bool:
    """Whether tables differ in figures alone."""

    def shape(table: CostTable) -> tuple[object, ...]:
        nodes = tuple((n.name, len(n.choices)) for n in table.nodes)
        edges = tuple((e.source, e.target, e.cut_pairs, np.isfinite(e.forward_s).tobytes()) for e in table.edges)
        return nodes, edges

    return all(shape(table) == shape(tables[0]) for table in tables[1:])


def envelope(tables: Sequence[CostTable], links: Sequence[Link]) -> CostTable:
    """The least of every figure over tables of the same structure.

    Raises:
        ValueError: if their structures differ.
    """
    if not same_structure(tables):
        raise ValueError("the tables of a mixed cluster differ in more than figures")
    nodes = tuple(_least_node(same) for same in zip(*(table.nodes for table in tables), strict=True))
    edges = tuple(_least_edge(same) for same in zip(*(table.edges for table in tables), strict=True))
    every = [table.link for table in tables] + list(links)
    return replace(
        tables[0],
        nodes=nodes,
        edges=edges,
        p2p_latency_s=min(link.latency_s for link in every),
        p2p_s_per_byte=min(link.s_per_byte for link in every),
        p2p_j_per_byte=min(link.j_per_byte for link in every),
    )


def _least_node(same: Sequence[CostNode]) -> CostNode:
    return replace(same[0], **{name: np.minimum.reduce([getattr(n, name) for n in same]) for name in NODE_FIGURES})


def _least_edge(same: Sequence[CostEdge]) -> CostEdge:
    return replace(same[0], **{name: np.minimum.reduce([getattr(e, name) for e in same]) for name in EDGE_FIGURES})
