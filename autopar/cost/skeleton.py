"""Skeleton: which nodes, edges and crossings a graph's cost tables have. Depends on the graph alone.

A template node stands for one op, hub or parameter in every block of its class; the first occurrence represents it.

- Every op gets an `op` node. Shared ops have only `replicate`: they are small (masks, positions), and their results
  can be sliced freely. Their results and all values from outside are available whole (`I`) on every rank, so edges
  from them are free and left out. Shared ops that cost the same stand in one node, and so do their hubs.
- A value that is no parameter and is read by two or more (op, operand) pairs gets a `hub` node. That of a shared or
  outside value has `I` as its only choice.
- A parameter read within one block is tied over the blocks of the class; one that several blocks read (tied weights)
  has its own node, at home in the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from autopar.ir.graph import Op, OpGraph

SHARED = -1
Key: TypeAlias = tuple[object, ...]


@dataclass
class NodeTemplate:
    """A node: `kind` is op, hub or param; `representative` is the name of its first op or value."""

    kind: str
    representative: str
    blocks: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    carries_boundary: bool = False


@dataclass
class EdgeTemplate:
    """Redistribution of `value` (first occurrence) from an output of `source` to an operand of `target`.

    `source_slot` is an output index of an op, `target_slot` an operand index of an op; both 0 for hubs and
    parameters. `earlier_slots` are operands of the same op that read the same value: an equal placement there has
    been paid already.
    """

    source: int
    source_slot: int
    target: int
    target_slot: int
    value: str
    earlier_slots: tuple[int, ...]
    blocks: list[int] = field(default_factory=list)
    cut_pairs: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class CrossingTemplate:
    """A value that later blocks read; placement is that of output `slot` of `node` (0 for a hub)."""

    value: str
    node: int
    slot: int
    producer_block: int
    last_block: int


@dataclass(frozen=True)
class Skeleton:
    """See the module docstring.

    Attributes:
        pinned_whole: parameters that shared ops read, stored whole.
        kept_shared: values made by shared ops whose storage other ops read, so that they stay alive.
        hubs: indices of hub nodes.
        hub_neighbours: of each hub: (node, slot, whether the slot is an output) of its producer and readers.
    """

    nodes: tuple[NodeTemplate, ...]
    edges: tuple[EdgeTemplate, ...]
    crossings: tuple[CrossingTemplate, ...]
    pinned_whole: frozenset[str]
    kept_shared: frozenset[str]

    @cached_property
    def hubs(self) -> tuple[int, ...]:
        return tuple(index for index, template in enumerate(self.nodes) if template.kind == "hub")

    @cached_property
    def hub_neighbours(self) -> Mapping[int, tuple[tuple[int, int, bool], ...]]:
        found: dict[int, list[tuple[int, int, bool]]] = {index: [] for index in self.hubs}
        for edge in self.edges:
            if edge.target in found:
                found[edge.target].append((edge.source, edge.source_slot, True))
            if edge.source in found:
                found[edge.source].append((edge.target, edge.target_slot, False))
        return {index: tuple(around) for index, around in found.items()}


def make_skeleton(graph: OpGraph, dims: Mapping[str, int | None]) -> Skeleton:
    """Nodes in execution order: of each op its parameters, then the op, then the hubs of its results.

    `dims` are the batch dims of values (see `rules.batch`).
    """
    return _Builder(graph, dims).build()


class _Builder:
    """Walks the ops once, adding nodes on first sight and counting occurrences."""

    def __init__(self, graph: OpGraph, dims: Mapping[str, int | None]) -> None:
        self.graph = graph
        self.nodes: list[NodeTemplate] = []
        self.node_index: dict[Key, int] = {}
        self.edges: dict[Key, EdgeTemplate] = {}
        self.op_node: dict[str, int] = {}
        self.hub_node: dict[str, int] = {}
        self.param_node: dict[str, int] = {}
        self.param_home: dict[str, int] = {}
        self.producer: dict[str, tuple[Op, int]] = {o: (op, i) for op in graph.ops for i, o in enumerate(op.outputs)}
        self.reads: dict[str, list[tuple[Op, int]]] = {}
        for op in graph.ops:
            for slot, name in enumerate(op.inputs):
                self.reads.setdefault(name, []).append((op, slot))
        self.shared = {op.name for op in graph.ops if op.is_shared}
        self.kept_shared = frozenset(
            value.root for name, value in graph.values.items()
            if name in self.producer and self.producer[name][0].is_shared and self._readers(name) - self.shared
        )  # fmt: skip
        self.op_keys = _op_keys(graph, dims, self.kept_shared)

    def build(self) -> Skeleton:
        for value in self.graph.values.values():
            if value.origin not in ("op", "parameter"):
                self._add_hub(value.name, ("hub", value.name), SHARED)
        for op in self.graph.ops:
            for name in dict.fromkeys(op.inputs):
                if self.graph.values[name].origin == "parameter":
                    self._add_parameter(name)
            self.op_node[op.name] = self._occur(("op", *self.op_keys[op.name]), "op", op.name, op.block)
            for slot, name in enumerate(op.outputs):
                self._add_hub(name, ("hub", *self.op_keys[op.name], slot), op.block)
        for value in self.graph.parameters:
            if value.name not in self.param_node:
                self._add_parameter(value.name)
        self._add_edges()
        crossings = tuple(self._crossings())
        self._mark_boundaries(crossings)
        return Skeleton(
            tuple(self.nodes), tuple(self.edges.values()), crossings,
            frozenset(v.name for v in self.graph.parameters if self._readers(v.name) & self.shared),
            self.kept_shared,
        )  # fmt: skip

    def _readers(self, name: str) -> set[str]:
        return {op.name for op, _ in self.reads.get(name, ())}

    def _occur(self, key: Key, kind: str, name: str, block: int) -> int:
        """Counts one occurrence of a node, made on first sight. Returns its index."""
        if key not in self.node_index:
            self.node_index[key] = len(self.nodes)
            self.nodes.append(NodeTemplate(kind, name))
        index = self.node_index[key]
        self.nodes[index].blocks.append(block)
        self.nodes[index].names.append(name)
        return index

    def _add_hub(self, name: str, key: Key, block: int) -> None:
        if len(self.reads.get(name, ())) >= 2:
            self.hub_node[name] = self._occur(key, "hub", name, block)

    def _add_parameter(self, name: str) -> None:
        if name in self.param_node:
            return
        readers = self.reads.get(name, [])
        blocks = sorted({op.block for op, _ in readers if op.block != SHARED})
        home = blocks[0] if blocks else 0
        key: Key = ("param", name)
        if len(blocks) == 1 and not any(op.is_shared for op, _ in readers):
            key = ("param", tuple((self.op_keys[op.name], slot) for op, slot in readers))
        self.param_home[name] = home
        self.param_node[name] = self._occur(key, "param", name, home)

    def _add_edges(self) -> None:
        for name, hub in self.hub_node.items():
            made = self.producer.get(name)
            if made is not None and not made[0].is_shared:
                op, slot = made
                self._edge((self.op_node[op.name], slot), (hub, 0), name, (), (op.block, op.block))
        for op in self.graph.ops:
            if not op.is_shared:
                for slot, name in enumerate(op.inputs):
                    self._add_operand(op, slot, name)

    def _add_operand(self, op: Op, slot: int, name: str) -> None:
        made = self.producer.get(name)
        if name in self.param_node:
            source, home = (self.param_node[name], 0), self.param_home[name]
        elif made is None or made[0].is_shared:
            return
        else:
            home = made[0].block
            source = (self.hub_node[name], 0) if name in self.hub_node else (self.op_node[made[0].name], made[1])
        earlier = tuple(i for i in range(slot) if op.inputs[i] == name)
        self._edge(source, (self.op_node[op.name], slot), name, earlier, (home, op.block))

    def _edge(
        self, source: tuple[int, int], target: tuple[int, int], name: str, earlier: tuple[int, ...],
        cut: tuple[int, int],
    ) -> None:  # fmt: skip
        edge = self.edges.setdefault((source, target, earlier), EdgeTemplate(*source, *target, name, earlier))
        edge.blocks.append(cut[1])
        edge.cut_pairs.append(cut)

    def _crossings(self) -> Iterable[CrossingTemplate]:
        for op in self.graph.ops:
            if op.is_shared:
                continue
            for slot, name in enumerate(op.outputs):
                last = max((reader.block for reader, _ in self.reads.get(name, ())), default=op.block)
                if last > op.block:
                    hub = self.hub_node.get(name)
                    node, at = (self.op_node[op.name], slot) if hub is None else (hub, 0)
                    yield CrossingTemplate(name, node, at, op.block, last)

    def _mark_boundaries(self, crossings: Iterable[CrossingTemplate]) -> None:
        """A node carries boundary bytes if most of its occurrences leave their block."""
        crossed: dict[int, set[int]] = {}
        for crossing in crossings:
            crossed.setdefault(crossing.node, set()).add(crossing.producer_block)
        for node, blocks in crossed.items():
            self.nodes[node].carries_boundary = 2 * len(blocks) > len(self.nodes[node].blocks)


def _op_keys(graph: OpGraph, dims: Mapping[str, int | None], kept_shared: frozenset[str]) -> Mapping[str, Key]:
    """(class, position in block) of each op; for shared ops all that their price depends on."""
    counts: dict[int, int] = {}
    keys: dict[str, Key] = {}
    for op in graph.ops:
        if op.block == SHARED:
            keys[op.name] = _shared_key(op, graph, dims, kept_shared)
            continue
        position = counts.get(op.block, 0)
        counts[op.block] = position + 1
        keys[op.name] = (graph.blocks[op.block].class_id, position)
    return keys


def _shared_key(op: Op, graph: OpGraph, dims: Mapping[str, int | None], kept_shared: frozenset[str]) -> Key:
    def look(name: str) -> Key:
        value = graph.values[name]
        root = graph.values[value.root]
        is_kept = name in kept_shared, root.name in kept_shared
        own = value.meta, value.origin, value.requires_grad, dims[name]
        return *own, name == root.name, root.meta, dims[root.name], *is_kept

    if op.members or op.mutates:
        return (op.name,)
    repeats = tuple(op.inputs.index(name) for name in op.inputs)
    around = tuple(look(name) for name in (*op.inputs, *op.outputs, *op.saved))
    work = op.flops_forward, op.flops_backward, op.saved_extra_bytes, len(op.inputs), len(op.outputs)
    return op.target, repeats, around, work
