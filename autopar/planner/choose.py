"""Choice: what is planned, among the search's answer, its contenders and the baselines, by simulated figures.

The search minimises a closed form of the pipeline's step time, which errs a little where stages differ. All candidates,
and variants of them that the search does not enumerate (`planner.variants`), are therefore simulated, paced as the
average power cap needs, and the best that keeps every limit is taken, so a plan is never dearer than a baseline under
the same simulation. Where energy counts, the plan of least time is a candidate too, at each of the clocks: it may be a
variant of a plan that no search for energy comes by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.cost.mixed import MixedCluster, MixedTables, mixed_tables
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import InfeasibleError, Remedy
from autopar.ir.graph import OpGraph
from autopar.ir.pipeline import FORWARD_ONLY
from autopar.ir.plan import Baseline, Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.solution import KEPT, Decisions, Limits, Objective, Pins, Solution
from autopar.ir.verify import broken_limits, limited_figures
from autopar.planner.cuts import with_even_cuts
from autopar.planner.passes import schemes, with_passes
from autopar.planner.pinned import check_constraints, check_inference, check_offload
from autopar.planner.request import PlanRequest, Target
from autopar.planner.variants import Variants
from autopar.planner.ways_out import with_offloads
from autopar.search.baselines import BASELINES, Family, best_of_family
from autopar.search.infeasible import WORDS
from autopar.search.solve import search
from autopar.units import format_bytes

MOST_ROUNDS = 4
"""Searches under limits tightened by what the simulation exceeds them."""
EQUAL = 1e-9
TRAINING_BASELINES = ("fsdp",)
"""Families that differ by what only training has."""
MEMORY_SLACK = 1e-9


@dataclass(frozen=True)
class Candidate:
    """Decisions with their simulated figures.

    Attributes:
        name: of the baseline, or "" for what the search found.
        value: simulated objective.
        formula: objective by the search's closed form, where known.
        tables: that price it.
    """

    name: str
    decisions: Decisions
    prediction: Prediction
    value: float
    formula: float | None
    tables: CostTables | MixedTables


@dataclass(frozen=True)
class Choice:
    """What is planned, the search behind it, and the baselines."""

    candidate: Candidate
    solution: Solution
    baselines: tuple[Baseline, ...]


@dataclass(frozen=True)
class Chooser:
    """Searches and simulates for one graph, request and cluster; `progress` is told what is being done."""

    graph: OpGraph
    request: PlanRequest
    target: Target
    progress: Callable[[str], None]

    def tables(self, pins: Pins) -> CostTables | MixedTables:
        """Cost tables under pins. Raises InputError for a per-op constraint that fits no op."""
        check_constraints(self.graph, pins)
        if self.graph.is_inference:
            check_inference(self.request)
        check_offload(self.graph, self.request)
        own, cluster = self.request.pins, self.target.cluster
        pins = replace(pins, offload_optimizer=own.offload_optimizer, offload_activations=own.offload_activations)
        if isinstance(cluster, MixedCluster):
            return mixed_tables(self.graph, cluster, pins, self.request.software)
        return CostTables(
            self.graph, cluster, pins=pins, profile=self.target.profile.store, software=self.request.software,
            keep=self.keep,
        )  # fmt: skip

    @property
    def keep(self) -> str:
        """What backward computes again on stages without full recompute."""
        return self.request.pins.recompute if self.request.pins.recompute in KEPT[1:] else "none"

    def choose(self, tables: CostTables | MixedTables) -> Choice:
        """The best candidate; `tables` are those of the request's pins.

        Raises:
            InfeasibleError: no plan fits, or none keeps the limits.
        """
        baselines, rivals = self.baselines() if self.request.with_baselines else ((), ())
        allowed = rivals if self.request.pins == Pins() else ()
        limits, overdrawn = self.request.limits, None
        for _ in range(MOST_ROUNDS):
            self.progress(f"searching plans for {self.graph.name} on up to {self.request.num_gpus} GPUs")
            try:
                solution = self._search(tables, limits, self.request.objective)
            except InfeasibleError as error:
                if overdrawn is None:
                    raise with_offloads(self, error) from error
                break
            self.progress("timing the plan")
            found = self._candidates(tables, solution)
            if self._may_slow_down(tables):
                found += self._slowed(tables, limits)
            kept = [c for c in (*found, *allowed) if self.is_kept(c)]
            if kept:
                return Choice(_best(kept), solution, baselines)
            overdrawn = found[0]
            limits = _tightened(limits, overdrawn.prediction)
        raise overdrawn_error(overdrawn, self.request.limits)

    def is_kept(self, candidate: Candidate) -> bool:
        """Whether simulated figures fit into memory and keep the limits."""
        cluster, prediction = self.target.cluster, candidate.prediction
        parts = [
            cluster.part(stage.gpu) if isinstance(cluster, MixedCluster) else cluster
            for stage in candidate.decisions.stages[: candidate.decisions.num_ranks]
        ]
        pairs = zip(prediction.peak_memory_bytes, parts, strict=True)
        fits = all(peak.value <= part.memory_bytes * (1 + MEMORY_SLACK) for peak, part in pairs)
        return fits and not broken_limits(prediction, self.request.limits)

    def candidate(
        self, tables: CostTables | MixedTables, decisions: Decisions, name: str = "", formula: float | None = None
    ) -> Candidate:
        """Decisions simulated, under the pins that the search knows nothing of, and paced if a power cap needs it."""
        return self._simulated(tables, self._finished(decisions), name, formula)

    def _simulated(
        self, tables: CostTables | MixedTables, decisions: Decisions, name: str = "", formula: float | None = None
    ) -> Candidate:
        paced, prediction = simulated(tables, decisions, self.request.limits)
        value = value_of(self.request.objective, paced, prediction)
        return Candidate(name, paced, prediction, value, formula, tables)

    def _finished(self, decisions: Decisions) -> Decisions:
        """With the name of what backward computes again, and the cuts that are pinned."""
        pins = self.request.pins
        if self.keep != "none":
            stages = (
                replace(s, recompute=self.keep if s.recompute == "none" else s.recompute) for s in decisions.stages
            )
            decisions = replace(decisions, stages=tuple(stages))
        decisions = replace(decisions, offload=pins.offload)
        if len(decisions.stages) > 1 and (pins.even_cuts or (pins.interleave or 1) > 1):
            return with_even_cuts(decisions, self.graph, pins.interleave or 1)
        return decisions

    def _search(self, tables: CostTables | MixedTables, limits: Limits, objective: Objective) -> Solution:
        request = self.request
        return search(
            tables,
            objective,
            pins=self.searched(request.pins),
            limits=limits,
            use_all=request.use_all,
            gap_tolerance=request.gap_tolerance,
            time_limit_s=request.time_limit_s,
            progress=self._follow,
        )

    def searched(self, pins: Pins) -> Pins:
        """Pins as the search takes them."""
        if self.graph.is_inference:
            return replace(pins, recompute="none", schedule=FORWARD_ONLY)
        is_fixed = self.keep != "none" or self.request.pins.offload_activations
        return replace(pins, recompute="none") if is_fixed else pins

    def _follow(self, state: Mapping[str, object]) -> None:
        """Tells the best objective so far and the bound on all plans."""
        best, least = state["incumbent"], state["least"]
        if isinstance(best, float) and isinstance(least, float) and math.isfinite(best) and best > 0:
            gap = max(0.0, 1 - max(least, 0.0) / best)
            found = f"best {best:.5g}, bound {max(least, 0.0):.5g}, gap {gap:.1%}"
            self.progress(f"searching: {found}; Ctrl-C takes the best")

    def _candidates(self, tables: CostTables | MixedTables, solution: Solution) -> list[Candidate]:
        if self.request.pins.pass_order is not None:
            return self._in_passes(tables, solution)
        found = [self.candidate(tables, solution.decisions, formula=solution.objective_value)]
        found += [self.candidate(tables, decisions) for decisions in solution.contenders]
        if isinstance(tables, CostTables) and self.keep == "none" and not self.graph.is_inference:
            variants = Variants(self.graph, tables, self.request.pins)
            searched = (solution.decisions, *solution.contenders)
            found += [self.candidate(own, other) for decisions in searched for own, other in variants.of(decisions)]
        return found

    def _may_slow_down(self, tables: CostTables | MixedTables) -> bool:
        has_variants = isinstance(tables, CostTables) and self.keep == "none" and not self.graph.is_inference
        is_in_passes = self.request.pins.pass_order is not None
        return self.request.objective.kind != "time" and has_variants and not is_in_passes

    def _slowed(self, tables: CostTables | MixedTables, limits: Limits) -> list[Candidate]:
        """The plan of least time, at its own clocks and locked at each of those that plans may choose."""
        self.progress("searching the plan of least time, to run it at lower clocks")
        found = self._candidates(tables, self._search(tables, limits, Objective("time")))
        fast = min((c for c in found if self.is_kept(c)), key=_step_time_s, default=min(found, key=_step_time_s))
        slower = [
            replace(fast.decisions, stages=tuple(replace(stage, clock_hz=hz) for stage in fast.decisions.stages))
            for hz in tables.clocks_hz[1:]
        ]
        return [fast, *(self._simulated(fast.tables, decisions) for decisions in slower)]

    def _in_passes(self, tables: CostTables | MixedTables, solution: Solution) -> list[Candidate]:
        """What of the search's answers can run in the passes that are pinned. Raises InputError where nothing can."""
        pins = self.request.pins
        searched = [self._finished(decisions) for decisions in (solution.decisions, *solution.contenders)]
        found = [self.candidate(tables, asked) for plain in searched for asked in schemes(self.graph, plain, pins)]
        return found or [self.candidate(tables, with_passes(self.graph, searched[0], pins))]

    def baselines(self) -> tuple[tuple[Baseline, ...], tuple[Candidate, ...]]:
        """The plans of known families, and those of them that fit."""
        rows, candidates = [], []
        for name, pins in BASELINES.items():
            if self.graph.is_inference and name in TRAINING_BASELINES:
                continue
            self.progress(f"searching the baseline {name}")
            tables = self.tables(pins)
            family = self._family(tables, pins, self.request.limits)
            if family.solution is None and not self.request.limits.is_free:
                family = self._family(tables, pins, Limits())
            if family.solution is None:
                rows.append(Baseline(name, "", 0, None, None, None, self._unfit(family.least_peak_bytes)))
                continue
            found = self.candidate(tables, family.solution.decisions, name, family.solution.objective_value)
            candidates.append(found)
            rows.append(self._row(found))
        return tuple(rows), tuple(candidates)

    def _family(self, tables: CostTables | MixedTables, pins: Pins, limits: Limits) -> Family:
        request = self.request
        return best_of_family(
            tables,
            request.objective,
            pins=self.searched(pins),
            limits=limits,
            use_all=request.use_all,
            gap_tolerance=request.gap_tolerance,
            time_limit_s=request.time_limit_s,
        )

    def _unfit(self, least_peak_bytes: float) -> str:
        if math.isinf(least_peak_bytes):
            return "does not divide over the devices, or no plan was found in time"
        have = format_bytes(self.target.cluster.memory_bytes)
        return f"does not fit: needs {format_bytes(least_peak_bytes)} of {have}"

    def _row(self, found: Candidate) -> Baseline:
        predicted, decisions = found.prediction, found.decisions
        broken = ", ".join(
            name.rsplit("_", 1)[0].replace("_", " ") for name in broken_limits(predicted, self.request.limits)
        )
        return Baseline(
            found.name,
            describe(decisions),
            decisions.num_gpus,
            predicted.step_time_s,
            predicted.energy_j,
            max(predicted.peak_memory_bytes, key=_value),
            f"breaks the {broken}" if broken else "",
        )


def mesh_words(decisions: Decisions) -> str:
    """`dp=4 x tp=2`; `dp=2 then tp=2` where stages have meshes of their own."""
    each = [" x ".join(f"{a.name}={a.size}" for a in mesh.axes if a.size > 1) or "dp=1" for mesh in decisions.meshes]
    return " then ".join(each if decisions.stage_meshes else each[:1])


def describe(decisions: Decisions) -> str:
    """`dp=4 x tp=2, pp=2, microbatches=8`."""
    mesh = mesh_words(decisions)
    chunks = f" x {decisions.interleave} chunks" if decisions.interleave > 1 else ""
    passes = "" if decisions.passes is None else f", passes={decisions.passes.count} by {decisions.passes.order}"
    return f"{mesh}, pp={decisions.num_ranks}{chunks}, microbatches={decisions.num_microbatches}{passes}"


def simulated(tables: CostTables | MixedTables, decisions: Decisions, limits: Limits) -> tuple[Decisions, Prediction]:
    """Decisions with the pace that the average power cap needs, none if it needs none, and their figures."""
    free = replace(decisions, pace_s=0.0)
    prediction = predict(tables, free)
    cap_w = limits.average_power_w
    if cap_w is None or prediction.average_power_w.value <= cap_w:
        return free, prediction
    dynamic_j = prediction.energy_by_cause["dynamic"]
    headroom_w = cap_w - (prediction.energy_j.value - dynamic_j) / prediction.step_time_s.value
    if headroom_w <= 0:
        return free, prediction
    paced = replace(free, pace_s=dynamic_j / headroom_w)
    return paced, predict(tables, paced)


def value_of(objective: Objective, decisions: Decisions, prediction: Prediction) -> float:
    """Simulated objective."""
    return objective.value(prediction.step_time_s.value, prediction.energy_j.value, decisions.num_gpus)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The least simulated objective; the first of equals."""
    least = min(candidate.value for candidate in candidates)
    return next(c for c in candidates if c.value <= least + EQUAL * abs(least))


def _tightened(limits: Limits, prediction: Prediction) -> Limits:
    """Limits lowered by the ratio in which simulated figures exceed them."""
    figures = limited_figures(prediction)
    changed = {
        name: getattr(limits, name) * getattr(limits, name) / figures[name] * (1 - 1e-6)
        for name in broken_limits(prediction, limits)
        if name != "average_power_w"
    }
    return replace(limits, **changed)


def overdrawn_error(found: Candidate | None, limits: Limits) -> InfeasibleError:
    """What a plan breaks when simulated."""
    if found is None:
        raise AssertionError("the first search raises or finds a plan")
    broken = broken_limits(found.prediction, limits)
    figures = limited_figures(found.prediction)
    need = ", ".join(f"{WORDS[name].figure} {WORDS[name].show(figures[name])}" for name in broken)
    have = ", ".join(f"{WORDS[name].figure} {WORDS[name].show(getattr(limits, name))}" for name in broken)
    effect = f"the plan found, simulated: {describe(found.decisions)}"
    remedies = tuple(Remedy(WORDS[name].at_least(figures[name]), effect, name, figures[name]) for name in broken)
    limit = " and ".join(WORDS[name].figure for name in broken) or "memory"
    return InfeasibleError(limit, f"{need} when simulated", have, remedies)


def _step_time_s(candidate: Candidate) -> float:
    return candidate.prediction.step_time_s.value


def _value(quantity: Quantity) -> float:
    return quantity.value
