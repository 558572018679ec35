"""What the search may choose for a model on so many devices, as features; and the features that decisions have.

A feature is a phrase: `linear by columns`, `kept as S`, `move S > R with gradient`, `parameter zero3`, `stages 2`.
Those of a model's space are read off the planner's own cost tables: every choice of every node on every axis size, and
every step of redistribution between two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autopar.cost.table import CostTables
from autopar.ir.cost import CostTable
from autopar.ir.graph import Op, OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.pipeline import SCHEDULES, effective_schedule, splits_backward
from autopar.ir.placement import INVARIANT, Sharding
from autopar.ir.software import Software
from autopar.ir.solution import KEPT, RECOMPUTE, Decisions, Pins
from autopar.ir.strategy import ParameterStrategy, Strategy, exposed_sharding, input_sharding, output_sharding
from autopar.planner.plan import capture_graph
from autopar.planner.request import PlanRequest, choose_target
from autopar.rewrite.layout import layout_of
from autopar.rules.recompute import layers
from autopar.rules.redistribute import redistribute_steps
from autopar.rules.table import packet
from autopar.search.space import mesh_sizes, microbatch_counts

GPU = "h100-sxm-80gb"
DEVICES = 4
MOST_CHUNKS = 3
ZERO_LEVELS = (None, 0, 1, 2, 3)


@dataclass(frozen=True)
class Shape:
    """Stages, the mesh of each, and pins that give its axes roles (none: the search's own meshes)."""

    num_stages: int
    sizes: tuple[int, ...]
    pins: Pins

    @property
    def features(self) -> frozenset[str]:
        mesh, pins = stage_mesh(*self.sizes), self.pins
        found = {f"stages {self.num_stages}", "mesh " + " x ".join(map(str, self.sizes))}
        if pins.dp is not None:
            found |= {f"axis {axis.name} of {axis.size}" for axis in mesh.axes if axis.size > 1}
            found |= set() if pins.zero is None else {f"pinned zero={pins.zero}"}
            found |= set() if pins.sequence is None else {f"pinned sequence={pins.sequence}"}
        return frozenset(found)


def shapes(num_blocks: int, processes: int) -> list[Shape]:
    """Every way to use so many devices."""
    found = []
    for stages in (k for k in range(1, processes + 1) if processes % k == 0 and k <= num_blocks):
        for pins in (Pins(), *_role_pins(processes // stages)):
            found += [Shape(stages, sizes, pins) for sizes in mesh_sizes(processes // stages, pins)]
    return found


def schedules(num_stages: int, num_microbatches: int) -> tuple[str, ...]:
    """Those that can run so many microbatches; zero-bubble cannot run all."""
    rounds = num_microbatches // num_stages
    is_even = rounds > 0 and num_microbatches % rounds == 0
    return tuple(name for name in SCHEDULES if is_even or not splits_backward(name, num_stages))


def _role_pins(num_devices: int) -> Iterator[Pins]:
    for cp, ep, tp in itertools.product((None, 1, 2, 4), (None, 1, 2, 4), (1, 2, 4)):
        dp, rest = divmod(num_devices, tp * (cp or 1))
        if rest or dp == 0 or (cp is None) != (ep is None) or dp % (ep or 1) or (cp, ep) == (1, 1):
            continue
        for zero, sequence in itertools.product(ZERO_LEVELS, (None, True, False) if tp > 1 else (None,)):
            yield Pins(dp=dp, tp=tp, zero=zero, sequence=sequence, ep=ep, cp=cp)


class Subject:
    """One model with options, captured at its global batch size, with its tables under pins."""

    def __init__(self, name: str, source: str, options: Mapping[str, str]) -> None:
        self.name, self.source, self.options = name, source, dict(options)
        self._tables: dict[tuple[Pins, str], CostTables] = {}
        self._features: dict[int, frozenset[str]] = {}

    @cached_property
    def graph(self) -> OpGraph:
        return capture_graph(self.source, self.options, None, None).graph

    @cached_property
    def ops(self) -> Mapping[str, Op]:
        return {op.name: op for op in self.graph.ops}

    def tables(self, pins: Pins, keep: str = "none") -> CostTables:
        """The planner's tables under pins."""
        if (pins, keep) not in self._tables:
            cluster = choose_target(PlanRequest(DEVICES, gpu=GPU)).cluster
            self._tables[pins, keep] = CostTables(self.graph, cluster, pins=pins, keep=keep)  # type: ignore[arg-type]
        return self._tables[pins, keep]

    @cached_property
    def has_repeats(self) -> bool:
        """Whether some block occurs more than once."""
        return len({block.class_id for block in self.graph.blocks}) < len(self.graph.blocks)

    def counts(self, shape: Shape) -> list[int]:
        """Numbers of microbatches that the batch divides into under a shape."""
        tables, mesh = self.tables(shape.pins), stage_mesh(*shape.sizes)
        counts = microbatch_counts(self.graph.batch_size, None, None)
        return [count for count in counts if tables.table(mesh, count) is not None]

    def chunks(self, num_stages: int) -> list[int]:
        """Numbers of chunks per pipeline rank, more than one, that the model has layers for."""
        every = range(2, MOST_CHUNKS + 1) if num_stages > 1 else ()
        return [v for v in every if len(layers(self.graph)) >= v * num_stages]

    def features(self, processes: int) -> frozenset[str]:
        """Everything that a plan of this model on so many processes can have."""
        if processes not in self._features:
            every = shapes(len(self.graph.blocks), processes)
            found = {f"model {self.name}", *_ALWAYS}.union(*(shape.features for shape in every))
            found -= set() if self.has_repeats else {"blocks free"}
            for shape in every:
                found |= self._pipeline_features(shape)
                table = None
                if shape.pins in (Pins(), Pins(dp=shape.sizes[0], tp=1, zero=2)) and max(shape.sizes) > 1:
                    table = self.tables(shape.pins).table(stage_mesh(*shape.sizes), 1)
                found |= set() if table is None else self._table_features(table)
            self._features[processes] = frozenset(found)
        return self._features[processes]

    def _pipeline_features(self, shape: Shape) -> set[str]:
        stages = shape.num_stages
        if stages == 1:
            return set()
        found = {"cuts even", *(f"recompute {policy} beside full" for policy in KEPT)}
        found |= {"cuts uneven"} if len(self.graph.blocks) > stages else set()
        for count in self.counts(shape):
            found |= {f"{count} microbatches on {stages} stages"}
            found |= {f"schedule {effective_schedule(name, stages, count)}" for name in schedules(stages, count)}
            found |= {f"interleaved by {v}" for v in self.chunks(stages) if count % stages == 0}
        return found

    def _table_features(self, table: CostTable) -> set[str]:
        """Features of all choices of all nodes, and of all moves between two of them."""
        sizes = table.mesh.sizes
        chosen = ((node.kind, node.names[0], choice) for node in table.nodes for choice in node.choices)
        found = {feature for entry in chosen for feature in self.choice_features(*entry, sizes)}
        if len(sizes) > 1:
            return found  # a step changes one axis: those on one axis are all there are
        made: dict[str, set[Sharding]] = {}
        hubs: dict[str, set[Sharding]] = {}
        for node in table.nodes:
            for name in node.names:
                for value, placements in self.results(node.kind, name, node.choices).items():
                    (hubs if node.kind == "hub" else made)[value] = placements
        for value, placements in hubs.items():
            found |= self.moves(value, made.get(value, {whole(sizes)}), placements, sizes)
        for node in (node for node in table.nodes if node.kind == "op"):
            for index, value in enumerate(self.ops[node.names[0]].inputs):
                needs = {input_sharding(choice, index) for choice in node.choices}
                found |= self.moves(value, hubs.get(value) or made.get(value, {whole(sizes)}), needs, sizes)
        return found

    def results(self, kind: str, name: str, choices: Iterable[Any]) -> dict[str, set[Sharding]]:
        """By value, the placements that choices of one node leave it in."""
        bare = name.removeprefix(f"{kind}:")
        if kind == "op":
            outputs = enumerate(self.ops[bare].outputs)
            return {value: {output_sharding(choice, slot) for choice in choices} for slot, value in outputs}
        return {bare: {exposed_sharding(choice) if kind == "param" else choice for choice in choices}}

    def choice_features(self, kind: str, name: str, choice: Any, sizes: Sequence[int]) -> Iterator[str]:
        """Of one choice of an op, of a value that several ops read, or of a parameter."""
        active = [axis for axis, size in zip(choice, sizes, strict=True) if size > 1]
        if kind == "hub":
            yield from (f"kept as {placement.kind}" for placement in active)
        elif kind == "op":
            yield from (f"{packet(self.ops[name].target)} by {axis.label}" for axis in active)
        else:
            yield from (f"parameter {axis.label}" for axis in active)
            if len(active) > 1:
                yield "parameter " + " x ".join(axis.label for axis in active)

    def moves(
        self, value: str, sources: Iterable[Sharding], targets: Iterable[Sharding], sizes: Sequence[int]
    ) -> set[str]:
        """Steps of redistribution of a value from any of some placements to any of others."""
        has_grad = self.graph.values[value].requires_grad
        ends = "with gradient" if has_grad else "without gradient"
        found = set()
        for source, target in itertools.product(set(sources), set(targets)):
            steps = redistribute_steps(source, target, tuple(sizes), has_grad)
            if steps is None:
                raise AssertionError(f"{value}: the search offers {source} -> {target}, which no steps make")
            found |= {f"move {step.source.kind} > {step.target.kind} {ends}" for step in steps}
        return found

    def features_of(self, decisions: Decisions, pins: Pins, software: Software) -> frozenset[str]:
        """Features that decisions have."""
        sizes = decisions.mesh.sizes
        found = {f"model {self.name}", *Shape(decisions.num_ranks, sizes, pins).features}
        found |= self._placed(decisions)
        found |= _run_features(decisions, software)
        found |= {"blocks tied" if _are_tied(self.tables(pins).table(decisions.mesh, 1), decisions) else "blocks free"}
        if decisions.num_ranks > 1:
            firsts = [stage.stop - stage.start for stage in decisions.stages]
            found.add("cuts even" if max(firsts) - min(firsts) <= 1 else "cuts uneven")
        return frozenset(found)

    def _placed(self, decisions: Decisions) -> set[str]:
        """Features of all choices, and of every step that the program takes between them."""
        sizes, layout = decisions.mesh.sizes, layout_of(self.graph, decisions)
        found: set[str] = set()
        entries: tuple[tuple[str, Mapping[str, Strategy | Sharding | ParameterStrategy]], ...] = (
            ("op", decisions.ops), ("hub", decisions.hubs), ("param", decisions.parameters),
        )  # fmt: skip
        for kind, chosen in entries:
            for name, choice in chosen.items():
                found.update(self.choice_features(kind, name, choice, sizes))
        for value in decisions.hubs:
            found |= self.moves(value, [layout.made(value)], [layout.kept(value)], sizes)
        for op in self.graph.ops:
            for index, value in enumerate(op.inputs):
                is_parameter = self.graph.values[value].origin == "parameter"
                source = layout.exposed(value) if is_parameter else layout.kept(value)
                found |= self.moves(value, [source], [layout.needed(op, index)], sizes)
        return found


_ALWAYS = ("blocks tied", "blocks free", "clocks locked", "paced", "gradients overlap", "parameters prefetched")
_ALWAYS += tuple(f"recompute {policy}" for policy in RECOMPUTE)


def _run_features(decisions: Decisions, software: Software) -> set[str]:
    """How decisions run, whatever the model."""
    stages, policies = decisions.num_ranks, sorted({stage.recompute for stage in decisions.stages})
    found = {f"recompute {policy}" for policy in policies}
    flags = {
        "clocks locked": any(stage.clock_hz for stage in decisions.stages),
        "paced": decisions.pace_s > 0,
        "gradients overlap": software.overlap_gradients,
        "parameters prefetched": software.prefetch_parameters,
    }
    found |= {name for name, is_on in flags.items() if is_on}
    if stages == 1:
        return found
    found.add(f"{decisions.num_microbatches} microbatches on {stages} stages")
    found |= {f"recompute {policy} beside full" for policy in policies if len(policies) > 1 and policy != "full"}
    if decisions.interleave > 1:
        return found | {f"interleaved by {decisions.interleave}"}
    return found | {f"schedule {effective_schedule(decisions.schedule, stages, decisions.num_microbatches)}"}


def _are_tied(table: CostTable | None, decisions: Decisions) -> bool:
    """Whether equal blocks have equal choices."""
    if table is None:
        return True
    chosen: dict[str, Mapping[str, Any]] = {
        "op": decisions.ops, "hub": decisions.hubs, "param": decisions.parameters
    }  # fmt: skip
    return all(len({chosen[n.kind][name.removeprefix(f"{n.kind}:")] for name in n.names}) == 1 for n in table.nodes)


def whole(sizes: Sequence[int]) -> Sharding:
    """The placement of what enters from outside."""
    return (INVARIANT,) * len(sizes)
