"""Random plans from all that the search may choose, drawn by hypothesis.

The skeleton of a plan (shape, microbatches, schedule, recompute, cuts, how the program runs) is drawn choice by choice;
then every node of the search's cost table takes a random choice from a drawn seed. Both prefer features that are still
`wanted`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from autopar.cost.predict import predict
from autopar.ir.cost import CostNode, CostTable
from autopar.ir.mesh import stage_mesh
from autopar.ir.placement import Sharding
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.software import Software
from autopar.ir.solution import KEPT, Decisions, Objective, Solution, StageChoice
from autopar.ir.strategy import input_sharding
from autopar.planner.choose import Candidate, Choice, value_of
from autopar.planner.cuts import with_even_cuts
from autopar.planner.plan import assemble_plan
from autopar.planner.request import PlanRequest, choose_target
from autopar.rules.redistribute import is_free, redistribute_steps
from autopar.search.untied import untied_table
from benchmarks.matrix_space import DEVICES, GPU, Shape, Subject, schedules, shapes, whole

STEERING = 0.8
"""How often a choice that brings a wanted feature is taken where there is one."""
PACE_S = 1e-3
Wanted = frozenset[str]
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A model and decisions for it. `keep` is the policy that its prices are made for."""

    subject: Subject
    shape: Shape
    decisions: Decisions
    software: Software
    keep: str

    @property
    def features(self) -> frozenset[str]:
        return self.subject.features_of(self.decisions, self.shape.pins, self.software)

    def plan(self) -> Plan:
        """As the planner would hand it over: priced by simulation and held against graph and cluster."""
        subject, decisions = self.subject, self.decisions
        request = PlanRequest(
            max(DEVICES, decisions.num_gpus), gpu=GPU, pins=self.shape.pins, software=self.software,
            objective=Objective("time"),
        )  # fmt: skip
        tables = subject.tables(self.shape.pins, self.keep)
        prediction = predict(tables, decisions)
        value = value_of(request.objective, decisions, prediction)
        solution = Solution(
            decisions, value, prediction.energy_j.value, request.objective, value, 0.0, "feasible", "drawn", 0.0
        )
        choice = Choice(Candidate("drawn", decisions, prediction, value, None, tables), solution, ())
        reference = ModelReference(subject.source, subject.options, "", 0)
        return assemble_plan(subject.graph, reference, request, choose_target(request), choice)


def draw_pair(subject: Subject, processes: int, wanted: Wanted, *, number: int, half: int) -> Pair:
    """One pair by hypothesis, the same for the same arguments; see `pairs`."""
    found: list[Pair] = []

    @seed(number)
    @settings(
        max_examples=2, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(pairs(subject, processes, wanted, half))
    def collect(pair: Pair) -> None:
        found.append(pair)

    collect()
    return found[-1]  # the first is hypothesis' simplest


@st.composite
def pairs(draw: st.DrawFn, subject: Subject, processes: int, wanted: Wanted, half: int) -> Pair:
    """Pairs of a model on exactly so many processes, with every second number of microbatches, from the `half`-th on.

    A model is captured and run serially once for each number of microbatches, which takes longer than a plan does.
    """
    every = shapes(len(subject.graph.blocks), processes)
    gains = {shape: _shape_gain(shape, wanted) for shape in every}
    numbers = sorted({shape.num_stages for shape in every} | {1})
    numbers += [number for number in numbers if number < processes] * 2  # a stage of one device has nothing to split
    stages = _one(draw, numbers, lambda k: any(gains[s] for s in every if s.num_stages == k))
    shape = _one(draw, [s for s in every if s.num_stages == stages], lambda s: gains[s])
    counts = subject.counts(shape)
    count = _one(draw, counts[half::2] or counts, lambda m: {f"{m} microbatches on {stages} stages"} & wanted)
    keep = _one(draw, KEPT, lambda k: {f"recompute {k}", f"recompute {k} beside full"} & wanted)
    table = subject.tables(shape.pins).table(stage_mesh(*shape.sizes), count)
    if table is None:
        raise AssertionError("counts are those that have a table")
    is_free_of_ties = _one(draw, (False, True), lambda free: {"blocks free" if free else "blocks tied"} & wanted)
    rng = random.Random(draw(st.integers(0, 2**32)))
    stay = draw(st.sampled_from([0.0, 0.5, 0.9]))
    chosen = _Drawer(subject, table.mesh.sizes, wanted, rng, stay).choose(
        untied_table(table) if is_free_of_ties else table
    )
    locked = _one(draw, (False, True), lambda lock: {"clocks locked"} & wanted if lock else ())
    paced = _one(draw, (False, True), lambda pace: {"paced"} & wanted if pace else ())
    clocks = subject.tables(shape.pins).clocks_hz
    clock_hz = draw(st.sampled_from(clocks[1:])) if locked else 0.0
    cut = [replace(s, clock_hz=clock_hz) for s in _stages(draw, len(subject.graph.blocks), stages, keep, wanted)]
    decisions = Decisions(
        table.mesh, count, draw(st.sampled_from(schedules(stages, count))), tuple(cut),
        ops=chosen["op"], hubs=chosen["hub"], parameters=chosen["param"], pace_s=PACE_S if paced else 0.0,
    )  # fmt: skip
    chunks = subject.chunks(stages) if count % stages == 0 else []
    interleave = _one(draw, [1, *chunks], lambda v: {f"interleaved by {v}"} & wanted)
    if interleave > 1:
        decisions = with_even_cuts(replace(decisions, schedule="1f1b"), subject.graph, interleave)
    software = Software(
        overlap_gradients=_one(draw, (False, True), lambda on: {"gradients overlap"} & wanted if on else ()),
        prefetch_parameters=_one(draw, (False, True), lambda on: {"parameters prefetched"} & wanted if on else ()),
    )
    return Pair(subject, shape, decisions, software, keep)


def _shape_gain(shape: Shape, wanted: Wanted) -> set[str]:
    found = set(shape.features & wanted)
    if shape.num_stages > 1:
        found |= {f for f in wanted if " on " in f and f.endswith(f" {shape.num_stages} stages")}
        found |= {f for f in wanted if f.startswith(("cuts", "interleaved", "schedule")) or f.endswith("beside full")}
    is_split = max(shape.sizes) > 1
    return found | {f for f in wanted if is_split and (" by " in f or f.startswith(("kept", "move", "parameter ")))}


def _one(draw: st.DrawFn, options: Sequence[T], gain: Callable[[T], Any]) -> T:
    """One of the options, of those with a gain where some have one, mostly."""
    best = [option for option in options if gain(option)]
    return draw(st.sampled_from(best if best and draw(st.floats(0, 1)) < STEERING else list(options)))


def _stages(draw: st.DrawFn, num_blocks: int, num_stages: int, keep: str, wanted: Wanted) -> list[StageChoice]:
    """Cuts anywhere, or as evenly as blocks go; each stage recomputes as `keep` says, or everything."""
    is_even = _one(draw, (True, False), lambda even: {"cuts even" if even else "cuts uneven"} & wanted)
    cuts = [num_blocks * k // num_stages for k in range(1, num_stages)]
    if not is_even and num_blocks > num_stages:
        cuts = sorted(draw(st.sets(st.integers(1, num_blocks - 1), min_size=len(cuts), max_size=len(cuts))))
    bounds = [0, *cuts, num_blocks]
    kinds = [(keep,), ("full",), (keep, "full")]
    allowed = _one(draw, kinds, lambda kind: {f"recompute {keep} beside full"} & wanted if len(kind) > 1 else ())
    policies = [draw(st.sampled_from(allowed)) for _ in range(num_stages)]
    if num_stages > 1:
        policies[:2] = (allowed * 2)[:2]
    return [StageChoice(*where) for where in zip(bounds, bounds[1:], policies, strict=False)]


class _Drawer:
    """Chooses for one node after another, in an order in which values are made before they are read."""

    def __init__(
        self, subject: Subject, sizes: tuple[int, ...], wanted: Wanted, rng: random.Random, stay: float
    ) -> None:
        """`stay` is how often an op takes a choice that its operands reach without traffic."""
        self.subject, self.sizes, self.wanted, self.rng, self.stay = subject, sizes, wanted, rng, stay
        self.kept: dict[str, Sharding] = {}
        self.position: dict[str, float] = {}
        for at, op in enumerate(subject.graph.ops):
            for name in op.inputs:
                self.position.setdefault(name, at - 0.5)
            self.position |= dict.fromkeys(op.outputs, at + 0.5)
            self.position[f"op:{op.name}"] = at

    def choose(self, table: CostTable) -> dict[str, dict[str, Any]]:
        """A choice for every op, hub and parameter, by kind and name."""
        found: dict[str, dict[str, Any]] = {"op": {}, "hub": {}, "param": {}}
        for node in sorted(table.nodes, key=self._order):
            choice = self._choice(node)
            for name in node.names:
                bare = name.removeprefix(f"{node.kind}:")
                found[node.kind][bare] = choice
                for value, (placement,) in self.subject.results(node.kind, bare, [choice]).items():
                    self.kept[value] = placement
        return {kind: dict(sorted(entries.items())) for kind, entries in found.items()}

    def _order(self, node: CostNode) -> float:
        name = node.names[0].removeprefix(f"{node.kind}:")
        return self.position.get(f"op:{name}" if node.kind == "op" else name, -1.0)

    def _choice(self, node: CostNode) -> Any:
        options = list(node.choices)
        if self.wanted and self.rng.random() < STEERING:
            options = [c for c in options if self.wanted.intersection(self._features(node, c))] or options
        if node.kind != "param" and self.rng.random() < self.stay:
            options = [c for c in options if self._is_quiet(node, c)] or options
        return self.rng.choice(options)

    def _needs(self, node: CostNode, choice: Any) -> Mapping[str, Sharding]:
        """What a choice reads, and how."""
        name = node.names[0].removeprefix(f"{node.kind}:")
        if node.kind == "hub":
            return {name: choice}
        if node.kind == "param":
            return {}
        return {value: input_sharding(choice, i) for i, value in enumerate(self.subject.ops[name].inputs)}

    def _features(self, node: CostNode, choice: Any) -> set[str]:
        name = node.names[0].removeprefix(f"{node.kind}:")
        found = set(self.subject.choice_features(node.kind, name, choice, self.sizes))
        for value, needed in self._needs(node, choice).items():
            found |= self.subject.moves(value, [self.kept.get(value, whole(self.sizes))], [needed], self.sizes)
        return found

    def _is_quiet(self, node: CostNode, choice: Any) -> bool:
        """Nothing is sent for it between ranks."""
        values = self.subject.graph.values
        for value, needed in self._needs(node, choice).items():
            source = self.kept.get(value, whole(self.sizes))
            steps = redistribute_steps(source, needed, self.sizes, values[value].requires_grad)
            if not all(map(is_free, steps or ())):
                return False
        return True
