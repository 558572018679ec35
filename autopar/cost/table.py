"""CostTables: makes the cost table of any stage mesh and microbatch size of one graph on one cluster.

The work is divided by what it depends on: `skeleton` (graph), `choices` (which axes are longer than 1), `pricing`
(sizes) and `transfers` (redistributions, linear in bytes). Only templates are priced, one per op of each distinct
block; everything over pairs of choices is array arithmetic on the few distinct shardings of both ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.cost.choices import ChoiceMaker
from autopar.cost.collective import send_cost
from autopar.cost.hardware import Cluster
from autopar.cost.layouts import Codes, divisors, sharding_ids, sharding_of
from autopar.cost.measured import OpLookup, apply_profile
from autopar.cost.memory import optimizer_states
from autopar.cost.pricing import NodePrice, Pricer, free_node, lay_out
from autopar.cost.skeleton import EdgeTemplate, NodeTemplate, make_skeleton
from autopar.cost.transfers import Transfers, price
from autopar.errors import InputError
from autopar.ir.cost import Array, CostEdge, CostNode, CostTable, Crossing
from autopar.ir.graph import Op, OpGraph, Value
from autopar.ir.mesh import StageMesh
from autopar.ir.solution import Pins
from autopar.rules.batch import batch_dims

KEPT_TABLES = 4


@dataclass
class _Node:
    """A node while a table is made. `outgoing[slot]`, `incoming[slot]`: sharding ids per choice."""

    template: NodeTemplate
    choices: tuple[object, ...]
    outgoing: tuple[Codes, ...]
    incoming: tuple[Codes, ...]
    price: NodePrice
    measured: int = 0


class CostTables:
    """Implements `ir.cost.TableSource`; `training=False` prices forward alone."""

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        *,
        pins: Pins | None = None,
        profile: OpLookup | None = None,
        training: bool = True,
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.pins = Pins() if pins is None else pins
        self.profile = profile
        self.dims = batch_dims(graph)
        self.skeleton = make_skeleton(graph)
        self._choices = ChoiceMaker(graph, self.pins, self.dims)
        self.training = training
        self.optimizer_states = optimizer_states(graph.optimizer)
        self._pricer = Pricer(cluster, graph.optimizer, training, self.skeleton.kept_shared)
        self._ops: Mapping[str, Op] = {op.name: op for op in graph.ops}
        self._transfers: dict[int, Transfers] = {}
        self._values: dict[int, dict[str, Value] | None] = {}
        self._tables: dict[tuple[StageMesh, int], CostTable | None] = {}
        self._clocked: dict[tuple[StageMesh, int, int], CostTable] = {}

    @property
    def device(self) -> Cluster:
        return self.cluster

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return self.cluster.clocks_hz

    def table(self, mesh: StageMesh, num_microbatches: int, clock: int = 0) -> CostTable | None:
        """The table at `clocks_hz[clock]`, or None where the batch does not divide.

        Raises:
            InputError: if a price is negative or not a number; names the op.
        """
        base = self._at_highest(mesh, num_microbatches)
        if clock == 0 or base is None:
            return base
        key = (mesh, num_microbatches, clock)
        if key not in self._clocked:
            while len(self._clocked) >= KEPT_TABLES:
                self._clocked.pop(next(iter(self._clocked)))
            self._clocked[key] = self._at_clock(base, clock)
        return self._clocked[key]

    def _at_clock(self, base: CostTable, clock: int) -> CostTable:
        """Op nodes scaled by what the model makes of the clock, so that measured rows keep their level."""
        fast, slow = (
            self._pricer,
            Pricer(self.cluster.at_clock(clock), self.graph.optimizer, self.training, self.skeleton.kept_shared),
        )
        values = self.microbatch_values(base.num_microbatches)
        if values is None:
            raise AssertionError("a table exists, so the batch divides")
        nodes = []
        for node, template in zip(base.nodes, self.skeleton.nodes, strict=True):
            if template.kind != "op":
                nodes.append(node)
                continue
            op = self._ops[template.representative]
            choices = self._choices.op(op, tuple(size > 1 for size in base.mesh.sizes))
            layout = lay_out(op, choices, values, base.mesh.sizes)
            count = base.num_microbatches if has_batch(op, self.dims) else 1
            prices = [pricer.op(op, layout, values, count, base.mesh) for pricer in (fast, slow)]
            nodes.append(_scaled(node, *prices))
        return replace(base, nodes=tuple(nodes))

    def _at_highest(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        key = (mesh, num_microbatches)
        if key not in self._tables:
            while len(self._tables) >= KEPT_TABLES:
                self._tables.pop(next(iter(self._tables)))
            values = self.microbatch_values(num_microbatches)
            pinned_dp = mesh.sizes[0] if self.pins.dp is not None and mesh.sizes else 1
            divides = values is not None and self.graph.batch_size // num_microbatches % pinned_dp == 0
            self._tables[key] = self._make(mesh, num_microbatches, values) if values and divides else None
        return self._tables[key]

    def microbatch_values(self, num_microbatches: int) -> dict[str, Value] | None:
        """The graph's values at the size of one microbatch, or None where the batch does not divide."""
        if num_microbatches not in self._values:
            self._values[num_microbatches] = self._divide(num_microbatches)
        return self._values[num_microbatches]

    def _divide(self, num_microbatches: int) -> dict[str, Value] | None:
        if self.graph.batch_size % num_microbatches:
            return None
        found = dict(self.graph.values)
        for name, dim in self.dims.items():
            if dim is not None:
                shape = list(found[name].meta.shape)
                if shape[dim] % num_microbatches:
                    return None
                shape[dim] //= num_microbatches
                found[name] = replace(found[name], meta=found[name].meta.with_shape(tuple(shape)))
        return found

    def _make(self, mesh: StageMesh, num_microbatches: int, values: dict[str, Value]) -> CostTable:
        return _TableMaker(self, mesh, num_microbatches, values).make()

    def transfers(self, num_axes: int) -> Transfers:
        return self._transfers.setdefault(num_axes, Transfers(num_axes))


def has_batch(op: Op, dims: Mapping[str, int | None]) -> bool:
    """Whether the op touches any value that counts samples."""
    return any(dims[name] is not None for name in (*op.inputs, *op.outputs))


def _scaled(node: CostNode, fast: NodePrice, slow: NodePrice) -> CostNode:
    """A node of a table at the highest clock, brought to the clock of `slow`."""

    def scaled(base: Array, of: Array, to: Array) -> Array:
        return base * np.divide(to, of, out=np.ones_like(of), where=of > 0)

    return replace(
        node,
        forward_s=scaled(node.forward_s, fast.forward_s, slow.forward_s),
        backward_s=scaled(node.backward_s, fast.backward_s, slow.backward_s),
        microbatch_j=scaled(node.microbatch_j, fast.microbatch_j, slow.microbatch_j),
    )


class _TableMaker:
    """Makes one table."""

    def __init__(self, source: CostTables, mesh: StageMesh, num_microbatches: int, values: dict[str, Value]) -> None:
        self.source = source
        self.mesh = mesh
        self.sizes = mesh.sizes
        self.active = tuple(size > 1 for size in self.sizes)
        self.num_microbatches = num_microbatches
        self.values = values
        self.transfers = source.transfers(len(self.sizes))

    def make(self) -> CostTable:
        source, skeleton = self.source, self.source.skeleton
        nodes: list[_Node | None] = [self._op(t) if t.kind == "op" else None for t in skeleton.nodes]
        self._add_parameters(nodes)
        self._add_hubs(nodes)
        complete = [node for node in nodes if node is not None]
        pairs = [self._pairs(edge, complete) for edge in skeleton.edges]
        self._gather_loss(complete)
        terms = self.transfers.terms(source.cluster, self.mesh)
        self._set_boundaries(complete)
        send = send_cost(source.cluster, same_node=2 * self.mesh.num_devices <= source.cluster.gpus_per_node)
        return CostTable(
            self.mesh, self.num_microbatches, len(source.graph.blocks),
            tuple(_finish(node) for node in complete),
            self._edges(complete, pairs, terms),
            self._crossings(complete),
            send.latency_s, send.s_per_byte, send.j_per_byte,
            _labels(complete),
        )  # fmt: skip

    def _op(self, template: NodeTemplate) -> _Node:
        op = self.source._ops[template.representative]
        choices = self.source._choices.op(op, self.active)
        layout = lay_out(op, choices, self.values, self.sizes)
        count = self.num_microbatches if has_batch(op, self.source.dims) else 1
        priced = self.source._pricer.op(op, layout, self.values, count, self.mesh)
        strategies = tuple(choices.grid.choices[i] for i in layout.kept)
        measured = 0
        if self.source.profile is not None:
            measured = apply_profile(
                self.source.profile, op, strategies=strategies, sizes=self.sizes, values=self.values, price=priced
            )
        if op.is_shared:
            priced.activation_bytes = priced.activation_bytes + self._kept_shared(op)
        return _Node(template, strategies, _ids(layout.outputs), _ids(layout.inputs), priced, measured)

    def _kept_shared(self, op: Op) -> float:
        kept = self.source.skeleton.kept_shared
        return float(sum(self.values[name].meta.num_bytes for name in op.outputs if name in kept))

    def _add_parameters(self, nodes: list[_Node | None]) -> None:
        """Parameters need terms of their own gathers before they can be priced."""
        templates = [(i, t) for i, t in enumerate(self.source.skeleton.nodes) if t.kind == "param"]
        found = []
        for index, template in templates:
            whole = any(name in self.source.skeleton.pinned_whole for name in template.names)
            value = self.values[template.representative]
            choices = self.source._choices.parameter(value.name, self.active, whole)
            ends = (sharding_ids(choices.gathered_from), sharding_ids(choices.exposed))
            found.append((index, template, value, choices, self.transfers.each(*ends, value.requires_grad)))
        terms = self.transfers.terms(self.source.cluster, self.mesh)
        in_block: dict[int, int] = {}
        for _, template, value, _, _ in found:
            in_block[template.blocks[0]] = in_block.get(template.blocks[0], 0) + value.meta.num_bytes
        for index, template, value, choices, pairs in found:
            kept, priced = self.source._pricer.parameter(
                value, choices, self.mesh, traffic=terms[pairs], block_bytes=in_block[template.blocks[0]]
            )
            strategies = tuple(choices.grid.choices[i] for i in kept)
            nodes[index] = _Node(template, strategies, (sharding_ids(choices.exposed)[kept],), (), priced)

    def _add_hubs(self, nodes: list[_Node | None]) -> None:
        """A hub may take every placement that its producer makes or a consumer accepts, axis by axis."""
        skeleton = self.source.skeleton
        seen: dict[int, list[Codes]] = {}
        for edge in skeleton.edges:
            source, target = skeleton.nodes[edge.source], skeleton.nodes[edge.target]
            if target.kind == "hub" and (node := nodes[edge.source]) is not None:
                seen.setdefault(edge.target, []).append(node.outgoing[edge.source_slot])
            if source.kind == "hub" and (node := nodes[edge.target]) is not None:
                seen.setdefault(edge.source, []).append(node.incoming[edge.target_slot])
        for index, template in enumerate(skeleton.nodes):
            if template.kind == "hub":
                nodes[index] = self._hub(template, seen.get(index, []))

    def _hub(self, template: NodeTemplate, seen: list[Codes]) -> _Node:
        num_axes, value = len(self.sizes), self.values[template.representative]
        codes = np.zeros((1, num_axes), dtype=np.int64)
        if seen:
            ids = np.unique(np.concatenate(seen))
            per_axis = [sorted({_code(i, axis, num_axes) for i in ids.tolist()}) for axis in range(num_axes)]
            codes = np.asarray(list(itertools.product(*per_axis)), dtype=np.int64)
            codes = codes[divisors(codes, value.meta.shape, self.sizes)[1]]
        placed = sharding_ids(codes)
        return _Node(
            template, tuple(sharding_of(i, num_axes) for i in placed.tolist()), (placed,), (placed,),
            free_node(len(placed)),
        )  # fmt: skip

    def _pairs(self, edge: EdgeTemplate, nodes: list[_Node]) -> tuple[NDArray[np.int64], Codes, Codes]:
        """Pair numbers of distinct shardings, and of which distinct one each choice is."""
        sources, of_source = np.unique(nodes[edge.source].outgoing[edge.source_slot], return_inverse=True)
        targets, of_target = np.unique(nodes[edge.target].incoming[edge.target_slot], return_inverse=True)
        requires_grad = self.values[edge.value].requires_grad
        return self.transfers.matrix(sources, targets, requires_grad), of_source, of_target

    def _edges(
        self, nodes: list[_Node], pairs: list[tuple[NDArray[np.int64], Codes, Codes]], terms: Array
    ) -> tuple[CostEdge, ...]:
        """One edge per pair of nodes and set of occurrences; edges that are free for every pair are left out."""
        merged: dict[object, CostEdge] = {}
        for edge, (numbers, of_source, of_target) in zip(self.source.skeleton.edges, pairs, strict=True):
            crosses_home = nodes[edge.source].template.kind == "param" and any(a != b for a, b in edge.cut_pairs)
            if not crosses_home and not np.any(terms[numbers]):
                continue
            prices = price(terms, numbers, self.values[edge.value].meta.num_bytes)
            grid = np.ix_(of_source, of_target)
            arrays = [prices.forward_s[grid], prices.backward_s[grid], prices.energy_j[grid]]
            if edge.earlier_slots:
                target = nodes[edge.target]
                again = np.zeros(len(target.choices), dtype=np.bool_)
                for slot in edge.earlier_slots:
                    again |= target.incoming[slot] == target.incoming[edge.target_slot]
                arrays = [np.where(again & np.isfinite(a), 0.0, a) for a in arrays]
            blocks, cuts = tuple(edge.blocks), tuple(edge.cut_pairs)
            key = (edge.source, edge.target, cuts)
            if key in merged:
                old = merged[key]
                arrays = [a + b for a, b in zip((old.forward_s, old.backward_s, old.microbatch_j), arrays, strict=True)]
            merged[key] = CostEdge(edge.source, edge.target, blocks, cuts, *arrays)
        return tuple(merged.values())

    def _gather_loss(self, nodes: list[_Node]) -> None:
        """The loss leaves whole on every axis: its producer pays for that."""
        for template, node in zip(self.source.skeleton.nodes, nodes, strict=True):
            op = self.source._ops.get(template.representative) if template.kind == "op" else None
            if op is None or self.source.graph.loss not in op.outputs:
                continue
            value = self.values[self.source.graph.loss]
            out = node.outgoing[op.outputs.index(value.name)]
            pairs = self.transfers.each(out, np.zeros_like(out), value.requires_grad)
            prices = price(self.transfers.terms(self.source.cluster, self.mesh), pairs, value.meta.num_bytes)
            node.price.forward_s = node.price.forward_s + prices.forward_s
            node.price.backward_s = node.price.backward_s + prices.backward_s
            node.price.microbatch_j = node.price.microbatch_j + prices.energy_j

    def _local_bytes(self, name: str, ids: Codes) -> Array:
        value, num_axes = self.values[name], len(self.sizes)
        distinct, of = np.unique(ids, return_inverse=True)
        codes = np.asarray([[_code(i, axis, num_axes) for axis in range(num_axes)] for i in distinct.tolist()])
        parts, _ = divisors(codes.reshape(len(distinct), num_axes), value.meta.shape, self.sizes)
        local: Array = (value.meta.num_bytes / parts)[of]
        return local

    def _set_boundaries(self, nodes: list[_Node]) -> None:
        """Also the buffer of a hub: the redistributed copy."""
        crossing = {c.node: c for c in self.source.skeleton.crossings}
        for index, node in enumerate(nodes):
            if node.template.carries_boundary:
                ids = node.outgoing[crossing[index].slot]
                node.price.boundary_bytes = self._local_bytes(crossing[index].value, ids)
            if node.template.kind == "hub":
                node.price.workspace_bytes = self._local_bytes(node.template.representative, node.outgoing[0])

    def _crossings(self, nodes: list[_Node]) -> tuple[Crossing, ...]:
        cache: dict[tuple[int, int], Array] = {}
        found = []
        for c in self.source.skeleton.crossings:
            key = (c.node, c.slot)
            if key not in cache:
                cache[key] = self._local_bytes(c.value, nodes[c.node].outgoing[c.slot])
            found.append(Crossing(c.value, c.node, c.producer_block, c.last_block, cache[key]))
        return tuple(found)


def _ids(codes: tuple[Codes, ...]) -> tuple[Codes, ...]:
    return tuple(sharding_ids(c) for c in codes)


def _code(sharding_id: int, axis: int, num_axes: int) -> int:
    return (sharding_id >> (4 * (num_axes - 1 - axis))) & 15


def _labels(nodes: list[_Node]) -> Mapping[str, int]:
    measured = sum(node.measured for node in nodes)
    return {"measured": measured, "modelled": sum(len(node.choices) for node in nodes) - measured}


def _finish(node: _Node) -> CostNode:
    """The node, checked."""
    name = node.template.representative
    arrays = vars(node.price)
    for field, array in arrays.items():
        if not bool(np.all(np.isfinite(array) & (array >= 0))):
            raise InputError(f"cost of {name!r} is not a finite, non-negative number: {field} = {array.tolist()}")
    prefix = "" if node.template.kind == "op" else f"{node.template.kind}:"
    return CostNode(
        f"{prefix}{name}",
        node.template.kind,
        node.choices,
        tuple(node.template.blocks),
        tuple(node.template.names),
        **arrays,
    )
