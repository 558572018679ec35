"""CostTables: makes the cost table of any stage mesh and microbatch size of one graph on one cluster.

The work is divided by what it depends on: `skeleton` (graph), `choices` and `sheets` (which axes are longer than 1),
`wiring` (which choices remain), `pricing` (sizes) and `transfers` (redistributions, linear in bytes). Only templates
are priced, one per op of each distinct block, and all of them at once, as flat arrays that the nodes and edges of the
table are views of.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.cost.choices import ChoiceMaker
from autopar.cost.collective import send_cost
from autopar.cost.fusion import make_fusion
from autopar.cost.hardware import Cluster
from autopar.cost.kernels import as_run_by
from autopar.cost.layouts import Codes, code_of, sharding_ids, sharding_of
from autopar.cost.measured import OpLookup, apply_profile
from autopar.cost.memory import gradient_bytes, optimizer_bytes, optimizer_states, slack_share
from autopar.cost.offload import Leaving, OffloadPrice, offload_activations, offload_prices
from autopar.cost.pricing import NodePrice, Pricer, free_node, rerun
from autopar.cost.recompute import recomputed
from autopar.cost.roofline import flop_rate
from autopar.cost.shards import Sizes, Tensors
from autopar.cost.sheets import Kept, ParameterSheet, make_op_sheet, make_parameter_sheet
from autopar.cost.skeleton import SHARED, EdgeTemplate, NodeTemplate, make_skeleton
from autopar.cost.transfers import Transfers, price, visible_terms
from autopar.cost.upkeep import Around, ParameterPricer, parameter_places
from autopar.cost.wiring import Form, Frame, Wiring
from autopar.cost.work import adding_s
from autopar.errors import InputError
from autopar.ir.cost import Array, ClockFigures, CostEdge, CostNode, CostTable, Crossing
from autopar.ir.graph import Op, OpGraph, Output, Value
from autopar.ir.mesh import StageMesh
from autopar.ir.software import Software
from autopar.ir.solution import Pins
from autopar.rules.batch import batch_dims
from autopar.rules.outputs import left_as

KEPT_TABLES = 4
HALF = 0.5
"""Of each send, in tables for inference: what reads a table counts sends twice, for a value and its gradient."""


class CostTables:
    """Implements `ir.cost.TableSource`.

    Attributes:
        training: False prices forward alone, as for an inference graph.
        software: how the program runs.
        run: the graph as its ops run on the devices of the cluster.
        keep: one of `ir.solution.KEPT`: what backward computes again on stages without full recompute.
    """

    def __init__(
        self,
        graph: OpGraph,
        cluster: Cluster,
        *,
        pins: Pins | None = None,
        profile: OpLookup | None = None,
        training: bool = True,
        software: Software | None = None,
        keep: str = "none",
    ) -> None:
        self.graph = graph
        self.cluster = cluster
        self.pins = Pins() if pins is None else pins
        self.profile = profile
        self.dims = batch_dims(graph)
        self.skeleton = make_skeleton(graph, self.dims)
        self.training = training and not graph.is_inference
        self.optimizer_states = optimizer_states(graph.optimizer)
        self.software = Software() if software is None else software
        self.keep = keep
        representatives = {template.representative for template in self.skeleton.nodes if template.kind == "op"}
        self.run = as_run_by(graph, cluster.spec.kind)
        self.fusion = make_fusion(self.run, self.software, [op for op in self.run.ops if op.name in representatives])
        self.again = recomputed(self.fusion.graph, keep)
        self.pricer = Pricer(cluster, self.training, self.software)
        self.gradient_bytes = sum(gradient_bytes(v, self.software) for v in graph.parameters if v.requires_grad)
        self.offload = offload_prices(cluster, self.pins.offload)
        self.parameter_pricer = self._parameter_pricer(cluster)
        self.tensors = Tensors(graph, self.dims)
        self.edge_tensors = np.array([self.tensors.index[edge.value] for edge in self.skeleton.edges], dtype=np.int64)
        self.heads = tuple(_node_head(template) for template in self.skeleton.nodes)
        self.edge_heads = tuple(_edge_head(edge, self.skeleton.nodes) for edge in self.skeleton.edges)
        self.block_flops = [0.0] * len(graph.blocks)
        for op in graph.ops:
            if not op.is_shared:
                self.block_flops[op.block] += op.flops_forward
        self.loss_block = next((op.block for op in graph.ops if graph.loss in op.outputs), SHARED)
        self.places = parameter_places(graph, self.skeleton)
        self._choices = ChoiceMaker(graph, self.pins, self.dims)
        self._frames: dict[tuple[bool, ...], Frame] = {}
        self._transfers: dict[int, Transfers] = {}
        self._tables: dict[tuple[StageMesh, int], CostTable | None] = {}

    @property
    def device(self) -> Cluster:
        return self.cluster

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return self.cluster.clocks_hz

    def on(self, cluster: Cluster) -> CostTables:
        """The same tables on another cluster; what follows from the graph alone is shared."""
        other = copy.copy(self)
        other.cluster = cluster
        other.pricer = Pricer(cluster, self.training, self.software)
        other.offload = offload_prices(cluster, self.pins.offload)
        other.parameter_pricer = other._parameter_pricer(cluster)
        other._tables = {}
        return other

    def _parameter_pricer(self, cluster: Cluster) -> ParameterPricer:
        states = optimizer_bytes(self.graph, self.optimizer_states, self.software)
        return ParameterPricer(
            cluster, self.graph.optimizer, self.training, self.software, self.gradient_bytes,
            offload=self.offload.optimizer, state_bytes=states,
        )  # fmt: skip

    def keeping(self, policy: str) -> CostTables:
        """The same tables with another of `ir.solution.KEPT`."""
        return CostTables(
            self.graph, self.cluster, pins=self.pins, profile=self.profile, training=self.training,
            software=self.software, keep=policy,
        )  # fmt: skip

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        """Op nodes move by what the model makes of each clock; measured rows in proportion."""
        base = self.table(mesh, num_microbatches)
        if base is None:
            return None
        frame, sizes = self.frame(tuple(size > 1 for size in mesh.sizes)), self.tensors.at(num_microbatches)
        kept = frame.ops.keep(sizes, mesh.sizes)
        own = self.pricer.ops(frame.ops, kept, sizes, mesh, num_microbatches)
        kernels = self.pricer.kernels_by_clock(frame.ops, kept, sizes, mesh, num_microbatches)
        times = self.times_again(frame, kept)
        kernels = (kernels[0], *rerun(*kernels, times))
        own.backward_s, own.microbatch_j = rerun(own.forward_s, own.backward_s, own.microbatch_j, times)
        counts = [len(node.choices) for node in base.nodes]
        starts = np.concatenate([[0], np.cumsum(counts)])
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in frame.op_nodes])
        figures = []
        for name, found, priced in zip(
            ("forward_s", "backward_s", "microbatch_j"),
            kernels,
            (own.forward_s, own.backward_s, own.microbatch_j),
            strict=True,
        ):
            flat = np.concatenate([getattr(node, name) for node in base.nodes])
            share = np.minimum(1.0, np.divide(flat[at], priced, out=np.ones_like(priced), where=priced > 0))
            stacked = np.repeat(flat[None, :], len(found), axis=0)
            stacked[:, at] += (found - found[0]) * share
            figures.append(stacked)
        return ClockFigures(*figures)

    def times_again(self, frame: Frame, kept: Kept) -> Array:
        """How often backward runs each choice's forward again."""
        times: Array = (frame.ops.reruns.times if self.training else np.zeros(len(frame.op_list)))[kept.owner]
        return times

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        """The table at the highest clock, or None where the batch does not divide or pins leave an op no choice.

        Raises:
            InputError: if a price is negative or not a number; names the op.
        """
        key = (mesh, num_microbatches)
        if key not in self._tables:
            while len(self._tables) >= KEPT_TABLES:
                self._tables.pop(next(iter(self._tables)))
            is_pinned = self.pins.roles or self.pins.dp is not None
            pinned_dp = math.prod(axis.size for axis in mesh.axes if is_pinned and axis.name in ("dp", "ep"))
            divides = self.tensors.divides(num_microbatches)
            divides = divides and self.graph.batch_size // num_microbatches % pinned_dp == 0
            self._tables[key] = self._make(mesh, num_microbatches) if divides else None
        return self._tables[key]

    def microbatch_values(self, num_microbatches: int) -> dict[str, Value]:
        """The graph's values at the size of one microbatch, into which the batch divides."""
        found = dict(self.graph.values)
        for name, dim in self.dims.items():
            if dim is not None:
                shape = list(found[name].meta.shape)
                shape[dim] //= num_microbatches
                found[name] = replace(found[name], meta=found[name].meta.with_shape(tuple(shape)))
        return found

    def _make(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        return _TableMaker(self, mesh, num_microbatches).make()

    def frame(self, active: tuple[bool, ...]) -> Frame:
        """What tables with these axes longer than 1 share."""
        if active not in self._frames:
            self._frames[active] = self._make_frame(active)
        return self._frames[active]

    def _make_frame(self, active: tuple[bool, ...]) -> Frame:
        skeleton = self.skeleton
        by_name: Mapping[str, Op] = {op.name: op for op in self.run.ops}
        op_nodes = tuple(i for i, template in enumerate(skeleton.nodes) if template.kind == "op")
        ops = [by_name[skeleton.nodes[i].representative] for i in op_nodes]
        choices = [self._choices.op(op, active) for op in ops]
        sheet = make_op_sheet(
            ops,
            choices,
            self.tensors,
            skeleton.kept_shared,
            self.fusion.moves,
            training=self.training,
            again=self.again,
            kept_by_makers=frozenset(name for op in self.fusion.graph.ops for name in op.saved if name in op.outputs),
            regathers=self.software.regathers_operands and self.pins.sequence is True,
        )
        nodes = tuple(i for i, template in enumerate(skeleton.nodes) if template.kind == "param")
        parameters = self._parameter_sheet(nodes, active) if nodes else None
        transfers = self._transfers.setdefault(len(active), Transfers(len(active), training=self.training))
        gathering = np.zeros(0, dtype=np.int64)
        if parameters is not None:
            trained = np.repeat(parameters.requires_grad, np.diff(parameters.owners.offsets))
            gathering = transfers.each(parameters.gathered_from, parameters.exposed_ids, trained)
        return Frame(
            self.graph, skeleton, self.tensors, transfers, op_nodes, tuple(ops), nodes, sheet, parameters, gathering
        )

    def _parameter_sheet(self, nodes: Sequence[int], active: tuple[bool, ...]) -> ParameterSheet:
        templates = [self.skeleton.nodes[i] for i in nodes]
        parameters = [self.graph.values[template.representative] for template in templates]
        whole = [any(name in self.skeleton.pinned_whole for name in template.names) for template in templates]
        choices = [self._choices.parameter(v.name, active, w) for v, w in zip(parameters, whole, strict=True)]
        return make_parameter_sheet(parameters, [t.blocks[0] for t in templates], choices, self.tensors)


def _node_head(template: NodeTemplate) -> tuple[tuple[str, str], tuple[tuple[int, ...], tuple[str, ...]]]:
    """Fields of a `CostNode` before and after its choices."""
    prefix = "" if template.kind == "op" else f"{template.kind}:"
    return (prefix + template.representative, template.kind), (tuple(template.blocks), tuple(template.names))


def _edge_head(
    edge: EdgeTemplate, nodes: Sequence[NodeTemplate]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], bool]:
    """Blocks and cuts of a `CostEdge`, and whether it is kept even where it costs nothing (parameters read abroad)."""
    crosses_home = nodes[edge.source].kind == "param" and any(a != b for a, b in edge.cut_pairs)
    return tuple(edge.blocks), tuple(edge.cut_pairs), crosses_home


@dataclass(frozen=True)
class _Node:
    """A node while a table is made; the arrays of `price` are views."""

    form: Form
    price: NodePrice


class _TableMaker:
    """Makes one table."""

    def __init__(self, source: CostTables, mesh: StageMesh, num_microbatches: int) -> None:
        self.source = source
        self.mesh = mesh
        self.axis_sizes = mesh.sizes
        self.num_microbatches = num_microbatches
        self.frame = source.frame(tuple(size > 1 for size in mesh.sizes))
        self.sizes: Sizes = source.tensors.at(num_microbatches)

    def make(self) -> CostTable | None:
        """The table; None where some op has no choice left."""
        source, frame, sizes, axis_sizes = self.source, self.frame, self.sizes, self.axis_sizes
        op_kept = frame.ops.keep(sizes, axis_sizes)
        parameter_kept = frame.parameters.keep(sizes, axis_sizes) if frame.parameters is not None else None
        forms = frame.forms(op_kept, parameter_kept.stored if parameter_kept else None, sizes, axis_sizes)
        if not all(form.choices for form in forms):
            return None
        wiring = frame.wiring(forms)
        results = self._result_pairs(forms)
        terms = frame.transfers.terms(source.cluster, self.mesh)
        flat = [source.pricer.ops(frame.ops, op_kept, sizes, self.mesh, self.num_microbatches)]
        prices = dict(_parts(flat[0], op_kept, frame.op_nodes))
        if frame.parameters is not None and parameter_kept is not None:
            gathering = terms[frame.gathering]
            if source.software.overlap_tensor:
                terms = visible_terms(terms, source.cluster.spec.overlap_slowdown)
            flat.append(
                source.parameter_pricer.price(
                    frame.parameters,
                    parameter_kept,
                    sizes,
                    self.mesh,
                    gathering=gathering,
                    around=self._around(flat[0], op_kept),
                )
            )
            prices |= _parts(flat[1], parameter_kept.stored, frame.parameter_nodes)
        prices |= {index: self._hub(index, forms[index]) for index in source.skeleton.hubs}
        nodes = [_Node(form, prices[index]) for index, form in enumerate(forms)]
        measured = self._apply_profile(nodes, op_kept) if source.profile is not None else 0
        ops = flat[0]
        times = source.times_again(frame, op_kept)
        ops.backward_s[:], ops.microbatch_j[:] = rerun(ops.forward_s, ops.backward_s, ops.microbatch_j, times)
        self._gather_results(nodes, terms, results)
        self._set_boundaries(nodes)
        if source.offload.activations is not None:
            self._offload(nodes, source.offload.activations)
        self._add_slack(nodes)
        self._check(flat, nodes)
        send = send_cost(source.cluster, same_node=2 * self.mesh.num_devices <= source.cluster.gpus_per_node)
        share = 1.0 if source.training else HALF
        return CostTable(
            self.mesh, self.num_microbatches, len(source.graph.blocks),
            tuple(CostNode(*head, node.form.choices, *rest, **vars(node.price))
                  for (head, rest), node in zip(source.heads, nodes, strict=True)),
            self._edges(wiring, terms, nodes),
            self._crossings(nodes),
            share * send.latency_s, share * send.s_per_byte, share * send.j_per_byte,
            self._labels(nodes, measured),
        )  # fmt: skip

    def _around(self, ops: NodePrice, kept: Kept) -> Around:
        """What goes on around parameters; seconds are those of GEMMs, bytes those of the least choices."""
        source, places = self.source, self.source.places
        rate = flop_rate(source.cluster.spec, "gemm", "bfloat16") * self.mesh.num_devices * self.num_microbatches
        least = np.minimum.reduceat(ops.workspace_bytes, kept.starts[:-1])
        work = np.zeros(len(source.graph.blocks))
        for op, size in zip(self.frame.op_list, least.tolist(), strict=True):
            if not op.is_shared:
                work[op.block] = max(work[op.block], size)
        return Around(
            np.array([source.block_flops[place.home] for place in places]) / rate,
            np.array([max(work[block] for block in place.readers) for place in places]),
            np.array([source.loss_block in place.readers for place in places], dtype=np.bool_),
            np.array([place.next_bytes for place in places]),
            self.num_microbatches,
        )

    def _hub(self, index: int, form: Form) -> NodePrice:
        """A hub keeps a buffer: the redistributed copy."""
        price = free_node(len(form.choices))
        value = self.source.skeleton.nodes[index].representative
        price.workspace_bytes = self._local_bytes(value, form, 0)
        return price

    def _local_bytes(self, value: str, form: Form, slot: int) -> Array:
        return self.frame.local_bytes(value, form, slot, self.sizes, self.axis_sizes)

    def _apply_profile(self, nodes: Sequence[_Node], kept: Kept) -> int:
        """Puts measured figures into the prices; returns how many choices were measured."""
        source, count = self.source, 0
        assert source.profile is not None
        values = source.microbatch_values(self.num_microbatches)
        adding = adding_s(source.cluster.spec, self.frame.ops, kept, self.sizes, self.num_microbatches)
        each = np.split(adding, kept.starts[1:-1])
        for index, op, own_s in zip(self.frame.op_nodes, self.frame.op_list, each, strict=True):
            count += apply_profile(
                source.profile, op, strategies=nodes[index].form.choices, sizes=self.axis_sizes, values=values,
                price=nodes[index].price, adding_s=own_s,
            )  # fmt: skip
        return count

    def _result_pairs(self, forms: Sequence[Form]) -> Sequence[tuple[int, str, Codes]]:
        """(node, value, pair numbers) of the form in which each result is held and that in which it leaves."""
        graph, skeleton = self.source.graph, self.source.skeleton
        nodes = {name: i for i, t in enumerate(skeleton.nodes) if t.kind == "hub" for name in t.names}
        found = []
        for index, op in zip(self.frame.op_nodes, self.frame.op_list, strict=True):
            for slot, name in enumerate(op.outputs):
                output = next((o for o in graph.outputs if o.value == name), None)
                if name != graph.loss and output is None:
                    continue
                holder = nodes.get(name, index)
                held = forms[holder].outgoing[slot if holder == index else 0]
                left = np.zeros_like(held) if output is None else _left_ids(held, output, len(self.axis_sizes))
                grads = np.full(len(held), graph.values[name].requires_grad)
                found.append((holder, name, self.frame.transfers.each(held, left, grads)))
        return found

    def _gather_results(self, nodes: Sequence[_Node], terms: Array, pairs: Sequence[tuple[int, str, Codes]]) -> None:
        """The loss leaves whole on every axis, outputs as `rules.outputs` says: who holds them pays for that."""
        for index, name, numbers in pairs:
            num_bytes = float(self.sizes.num_bytes[self.source.tensors.index[name]])
            found, own = price(terms, numbers, num_bytes), nodes[index].price
            own.forward_s += found.forward_s
            own.backward_s += found.backward_s
            own.microbatch_j += found.energy_j

    def _set_boundaries(self, nodes: Sequence[_Node]) -> None:
        crossing = {c.node: c for c in self.source.skeleton.crossings}
        for index, c in crossing.items():
            if self.source.skeleton.nodes[index].carries_boundary:
                nodes[index].price.boundary_bytes[:] = self._local_bytes(c.value, nodes[index].form, c.slot)

    def _offload(self, nodes: Sequence[_Node], price: OffloadPrice) -> None:
        skeleton = self.source.skeleton
        leaving = [
            Leaving(nodes[index].price, self._input_bytes(op), len(skeleton.nodes[index].blocks))
            for index, op in zip(self.frame.op_nodes, self.frame.op_list, strict=True)
        ]
        offload_activations(leaving, price)

    def _input_bytes(self, op: Op) -> float:
        """Of what an op saves, as much is part of the batch, which stays where it is."""
        saved = [name for name in op.saved if self.source.graph.values[name].origin == "input"]
        return float(sum(self.sizes.num_bytes[self.source.tensors.index[name]] for name in saved))

    def _add_slack(self, nodes: Sequence[_Node]) -> None:
        """What moves takes more from the device where that is metered."""
        slack = slack_share(self.source.software, self.source.cluster.spec.unseen_share)
        for node in nodes if slack else ():
            price = node.price
            for array in (price.activation_bytes, price.boundary_bytes, price.workspace_bytes):
                np.multiply(array, 1.0 + slack, out=array)

    def _crossings(self, nodes: Sequence[_Node]) -> tuple[Crossing, ...]:
        cache: dict[tuple[int, int], Array] = {}
        found = []
        for c in self.source.skeleton.crossings:
            key = (c.node, c.slot)
            if key not in cache:
                cache[key] = self._local_bytes(c.value, nodes[c.node].form, c.slot)
            found.append(Crossing(c.value, c.node, c.producer_block, c.last_block, cache[key]))
        return tuple(found)

    def _edges(self, wiring: Wiring, terms: Array, nodes: Sequence[_Node]) -> tuple[CostEdge, ...]:
        """One edge per pair of nodes and set of occurrences; edges that are free for every pair are left out."""
        if not len(wiring.numbers):
            return ()
        edge_bytes = self.sizes.num_bytes[self.source.edge_tensors]
        prices = price(terms, wiring.numbers, edge_bytes[wiring.edge])
        arrays = [prices.forward_s[wiring.expand], prices.backward_s[wiring.expand], prices.energy_j[wiring.expand]]
        if len(wiring.again):
            again = wiring.again[np.isfinite(arrays[0][wiring.again])]
            for array in arrays:
                array[again] = 0.0
        costs = np.logical_or.reduceat(np.any(terms[wiring.numbers], axis=1), wiring.starts)
        merged: dict[object, CostEdge] = {}
        for i, (edge, (blocks, cuts, is_kept)) in enumerate(
            zip(self.source.skeleton.edges, self.source.edge_heads, strict=True)
        ):
            if not (is_kept or costs[i]):
                continue
            shape = (len(nodes[edge.source].form.choices), len(nodes[edge.target].form.choices))
            span = slice(wiring.offsets[i], wiring.offsets[i + 1])
            own = [array[span].reshape(shape) for array in arrays]
            key = (edge.source, edge.target, cuts)
            if key in merged:
                old = merged[key]
                own = [a + b for a, b in zip((old.forward_s, old.backward_s, old.microbatch_j), own, strict=True)]
            merged[key] = CostEdge(edge.source, edge.target, blocks, cuts, *own)
        return tuple(merged.values())

    def _labels(self, nodes: Sequence[_Node], measured: int) -> Mapping[str, int]:
        """Counted once per distinct op of a block, but for every shared op."""
        total = 0
        for template, node in zip(self.source.skeleton.nodes, nodes, strict=True):
            times = template.blocks.count(SHARED) if template.blocks[0] == SHARED else 1
            total += times * len(node.form.choices)
        return {"measured": measured, "modelled": total - measured}

    def _check(self, flat: Sequence[NodePrice], nodes: Sequence[_Node]) -> None:
        if all(_is_price(array) for prices in flat for array in prices.arrays.values()):
            return
        for template, node in zip(self.source.skeleton.nodes, nodes, strict=True):
            for field, array in node.price.arrays.items():
                if not _is_price(array):
                    name, found = template.representative, array.tolist()
                    raise InputError(f"cost of {name!r} is not a finite, non-negative number: {field} = {found}")


def _left_ids(held: Codes, output: Output, num_axes: int) -> Codes:
    """Sharding ids in which an output leaves, by those in which it is held."""
    rows = [[code_of(p) for p in left_as(sharding_of(i, num_axes), output)] for i in held.tolist()]
    return sharding_ids(np.asarray(rows, dtype=np.int64).reshape(len(rows), num_axes))


def _is_price(array: Array) -> bool:
    return bool(np.all(np.isfinite(array) & (array >= 0)))


def _parts(price: NodePrice, kept: Kept, nodes: Sequence[int]) -> Iterator[tuple[int, NodePrice]]:
    """Each node's part of flat prices."""
    bounds = kept.starts.tolist()
    for node, start, stop in zip(nodes, bounds, bounds[1:], strict=False):
        yield node, price.part(start, stop)
