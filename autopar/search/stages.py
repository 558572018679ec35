"""Stages: best-first search over skeletons for one weighted objective alpha T + beta E.

Each skeleton carries a lower bound, and the one with the least is refined next:

    ideal     from one-device tables (only in large spaces, see `space.IdealBound`)
    coarser   from a table of the same mesh with fewer microbatches (same assumption)
    table     elimination with spread weights; bottleneck of per-block minima
    memory    the aggregated memory row with a multiplier
    layouts   every cut and recompute pattern that can still win, each with its own multipliers, then HiGHS

Every choice met on the way becomes plans by the cut programme (`cuts`), evaluated exactly (`evaluate`). A skeleton is
closed when its bound reaches incumbent * (1 - tolerance); the least bound of all closed skeletons is the answer's.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from autopar.ir.cost import Array, Device, TableSource
from autopar.ir.solution import Objective
from autopar.search.bounds import make_layout_bound, tighten
from autopar.search.branch import close_gap
from autopar.search.cuts import CutRules, Prices, best_cuts
from autopar.search.evaluate import MEMORY_TOLERANCE, Figures, Layout, evaluate, fixed_power_w
from autopar.search.optimist import MOST_LAYOUTS, Blocks, make_optimist, pay_vectors
from autopar.search.problem import Problem, Weights, make_problem
from autopar.search.relax import (
    Relaxation,
    additive_weights,
    largest_useful_tau,
    least_bottleneck,
    least_in_flight,
    memory_relaxation,
    spread_weights,
)
from autopar.search.space import FEW_TABLES, MODES, IdealBound, Skeleton

LAYOUT_WORK = 6_000_000
LAYOUT_OVERHEAD = 20_000
"""A skeleton closes at most LAYOUT_WORK / (strategies + pairs + LAYOUT_OVERHEAD) layouts; the rest keep their bound."""
IMPROVE_ROUNDS = 3
ROUNDING = 1e-9

Progress = Callable[[dict[str, object]], None]


@dataclass(frozen=True)
class Plan:
    """One evaluated plan; `choice` indexes the table's strategies."""

    skeleton: Skeleton
    layout: Layout
    choice: tuple[int, ...]
    figures: Figures


@dataclass
class Space:
    """What all weighted searches of one call share: tables, problems, plans met, per-block minima.

    Attributes:
        deadline_s: `time.monotonic` value at which the search stops, or None.
        plans: best plan per skeleton under `objective`.
        best: best plan of all under `objective`.
        ideal_scale, coarser_scale: <= 1; what a table contradicted the two assumed bounds by.
    """

    source: TableSource
    objective: Objective
    schedule: str
    tolerance: float
    skeletons: tuple[Skeleton, ...]
    deadline_s: float | None = None
    progress: Progress | None = None
    problems: dict[tuple[tuple[int, ...], int], Problem | None] = field(default_factory=dict)
    parts: dict[tuple[tuple[int, ...], int], Blocks] = field(default_factory=dict)
    bottlenecks: dict[tuple[tuple[int, ...], int, int], float] = field(default_factory=dict)
    plans: dict[Skeleton, Plan] = field(default_factory=dict)
    best: Plan | None = None
    ideal: IdealBound | None = None
    ideal_scale: float = 1.0
    coarser_scale: float = 1.0

    def __post_init__(self) -> None:
        if len({(s.sizes, s.num_microbatches) for s in self.skeletons}) > FEW_TABLES:
            self.ideal = IdealBound(self.source)

    @property
    def device(self) -> Device:
        return self.source.device

    @property
    def out_of_time(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s

    def problem(self, sizes: tuple[int, ...], num_microbatches: int) -> Problem | None:
        key = (sizes, num_microbatches)
        if key not in self.problems:
            table = self.source.table(Skeleton(1, sizes, num_microbatches, "none").mesh, num_microbatches)
            self.problems[key] = make_problem(table) if table is not None else None
        return self.problems[key]

    def ideal_bottleneck(self, skeleton: Skeleton, seconds: Array) -> float:
        key = (skeleton.sizes, skeleton.num_microbatches, skeleton.num_stages)
        if key not in self.bottlenecks:
            self.bottlenecks[key] = least_bottleneck(seconds, skeleton.num_stages)
        return self.bottlenecks[key]

    def blocks(self, skeleton: Skeleton, problem: Problem) -> Blocks:
        return self.parts.setdefault((skeleton.sizes, skeleton.num_microbatches), Blocks(problem))

    def value(self, plan: Plan) -> float:
        return self.objective.value(plan.figures.time_s, plan.figures.energy_j)

    def record(self, plan: Plan) -> None:
        """Keep the plan if it is the best of its skeleton, and of all."""
        known = self.plans.get(plan.skeleton)
        if known is None or self.value(plan) < self.value(known):
            self.plans[plan.skeleton] = plan
        if self.best is None or self.value(plan) < self.value(self.best):
            self.best = plan


@dataclass(frozen=True)
class WeightedResult:
    """`bound` <= alpha T + beta E of every plan; `value` is the best plan's, inf if none was found."""

    value: float
    bound: float
    plan: Plan | None
    complete: bool


@dataclass
class WeightedSearch:
    """Minimises alpha T + beta E over the skeletons of a space."""

    space: Space
    alpha: float
    beta: float
    bounds: dict[Skeleton, float] = field(default_factory=dict)
    value: float = math.inf
    plan: Plan | None = None
    offered: set[tuple[Skeleton, tuple[int, ...]]] = field(default_factory=set)
    assumed: dict[Skeleton, float] = field(default_factory=dict)

    @property
    def cutoff(self) -> float:
        """A bound at least this high closes a skeleton."""
        return self.value * (1 - self.space.tolerance) if math.isfinite(self.value) else math.inf

    def prices(self, num_gpus: int) -> Prices:
        return Prices(self.alpha + self.beta * fixed_power_w(self.space.device, num_gpus), self.beta)

    def run(self) -> WeightedResult:
        """Best-first over all skeletons."""
        scales = (self.space.ideal_scale, self.space.coarser_scale)
        heap = [(max(self._ideal(s)), 0, s) for s in self.space.skeletons]
        heapq.heapify(heap)
        complete = True
        while heap:
            bound, level, skeleton = heapq.heappop(heap)
            self.bounds[skeleton] = bound
            if bound >= self.cutoff or self.space.out_of_time:
                complete = bound >= self.cutoff
                self.bounds |= {s: b for b, _, s in heap}
                break
            refined = max(bound, self._refine(skeleton, level))
            self._report(skeleton, level, refined)
            if scales != (self.space.ideal_scale, self.space.coarser_scale):
                return self.run()
            if level == len(self._levels) - 1 or refined >= self.cutoff:
                self.bounds[skeleton] = refined
            else:
                heapq.heappush(heap, (refined, level + 1, skeleton))
        best_bound = min([*self.bounds.values(), self.value])
        return WeightedResult(self.value, best_bound, self.plan, complete)

    def _report(self, skeleton: Skeleton, level: int, bound: float) -> None:
        if self.space.progress is not None:
            self.space.progress(
                {"skeleton": skeleton.describe(), "level": self._levels[level], "bound": bound, "incumbent": self.value}
            )

    _levels = ("coarser", "table", "memory", "layouts")

    def _refine(self, skeleton: Skeleton, level: int) -> float:
        if level == 0:
            self.assumed[skeleton] = self._coarser(skeleton)
            return self.assumed[skeleton]
        problem = self.space.problem(skeleton.sizes, skeleton.num_microbatches)
        if problem is None:
            return math.inf
        relax = Relaxation(
            problem,
            skeleton.num_stages,
            skeleton.mode,
            self.space.schedule,
            self.prices(skeleton.num_gpus),
            float(self.space.device.memory_bytes),
        )
        return (self._table, self._memory, self._layouts)[level - 1](skeleton, relax)

    def _ideal(self, skeleton: Skeleton) -> tuple[float, float]:
        """Spread and bottleneck bounds of perfect splits (see `relax` for both)."""
        ideal, scale = self.space.ideal, self.space.ideal_scale
        if ideal is None:
            return -math.inf, -math.inf
        blocks = ideal.blocks(skeleton.sizes, skeleton.num_microbatches)
        if blocks is None:
            return math.inf, math.inf
        stages, prices = skeleton.num_stages, self.prices(skeleton.num_gpus)
        time_s, energy_j, state = blocks[:, :-1].sum(axis=1) + stages * blocks[:, -1]
        if state > stages * self.space.device.memory_bytes * (1 + MEMORY_TOLERANCE):
            return math.inf, math.inf
        bottleneck = self.space.ideal_bottleneck(skeleton, blocks[0])
        waits = skeleton.num_microbatches - 1
        return (
            scale * float(prices.step_weight * time_s * (1 + waits / stages) + prices.beta * energy_j),
            scale * float(prices.step_weight * (time_s + waits * bottleneck) + prices.beta * energy_j),
        )

    def _coarser(self, skeleton: Skeleton) -> float:
        """Spread bound from the finest table already made for this mesh with a divisor of M microbatches."""
        if self.space.ideal is None:
            return -math.inf
        made = [
            (count, problem)
            for (sizes, count), problem in self.space.problems.items()
            if sizes == skeleton.sizes
            and problem is not None
            and count < skeleton.num_microbatches
            and skeleton.num_microbatches % count == 0
        ]
        if not made:
            return -math.inf
        count, problem = max(made, key=lambda entry: entry[0])
        prices = self.prices(skeleton.num_gpus)
        factor = (1 + (skeleton.num_microbatches - 1) / skeleton.num_stages) * count / skeleton.num_microbatches
        scaled = Relaxation(
            problem,
            skeleton.num_stages,
            skeleton.mode,
            self.space.schedule,
            Prices(prices.step_weight * factor, prices.beta),
            self.space.device.memory_bytes,
        )
        weights = additive_weights(scaled)
        return self.space.coarser_scale * problem.solve(Weights(weights.blocks)).value

    def _check_assumptions(self, skeleton: Skeleton, spread: float) -> None:
        """Scale the assumed bounds down where a table of this skeleton lies below them."""
        if self.space.ideal is None or not math.isfinite(spread):
            return
        ideal, coarser = self._ideal(skeleton)[0], self.assumed.pop(skeleton, -math.inf)
        if spread < ideal * (1 - ROUNDING):
            self.space.ideal_scale *= max(spread, 0.0) / ideal
        if spread < coarser * (1 - ROUNDING):
            self.space.coarser_scale *= max(spread, 0.0) / coarser

    def _rules(self, skeleton: Skeleton, relax: Relaxation) -> CutRules:
        return CutRules(skeleton.num_stages, self.space.schedule, MODES[skeleton.mode], relax.memory_bytes)

    def _offer(self, skeleton: Skeleton, relax: Relaxation, choice: tuple[int, ...]) -> float:
        """Make the best plan of these shardings; returns the cutoff."""
        if (skeleton, choice) in self.offered:
            return self.cutoff
        self.offered.add((skeleton, choice))
        found = best_cuts(relax.problem, choice, self._rules(skeleton, relax), relax.prices)
        if found is None:
            return self.cutoff
        layout = found[1]
        original = relax.problem.original(choice)
        figures = evaluate(relax.problem.table, self.space.device, layout, original)
        if figures.fits(relax.memory_bytes) and math.isfinite(figures.time_s):
            mode = "mixed" if len(set(layout.recompute)) > 1 else "full" if layout.recompute[0] else "none"
            plan = Plan(replace(skeleton, mode=mode), layout, original, figures)
            self.space.record(plan)
            value = self.alpha * figures.time_s + self.beta * figures.energy_j
            if value < self.value:
                self.value, self.plan = value, plan
        return self.cutoff

    def _table(self, skeleton: Skeleton, relax: Relaxation) -> float:
        weights = spread_weights(relax)
        run = relax.problem.solve(weights)
        bound = run.value + weights.constant
        self._check_assumptions(skeleton, bound)
        if run.choice is None or bound >= self._offer(skeleton, relax, run.choice):
            return bound
        if relax.slope == 0 or relax.num_stages == 1:
            return bound
        weights = additive_weights(relax)
        run = relax.problem.solve(weights)
        if run.choice is not None:
            self._offer(skeleton, relax, run.choice)
        tau = least_bottleneck(self._minima(skeleton, relax), relax.num_stages)
        return max(bound, run.value + weights.constant + relax.slope * tau)

    def _additive(self, relax: Relaxation) -> float:
        weights = additive_weights(relax)
        return relax.problem.solve(weights).value + weights.constant

    def _minima(self, skeleton: Skeleton, relax: Relaxation) -> Array:
        """Least loaded seconds of every block."""
        vectors = pay_vectors(1.0, 0.0, redo=skeleton.mode == "full")
        return self.space.blocks(skeleton, relax.problem).minima(*vectors)

    def _tau_cap(self, skeleton: Skeleton, relax: Relaxation) -> tuple[Array, float]:
        minima = self._minima(skeleton, relax)
        return minima, largest_useful_tau(relax, self._additive(relax), self.cutoff)

    def _memory(self, skeleton: Skeleton, relax: Relaxation) -> float:
        if relax.num_stages == 1:
            return -math.inf
        minima, cap = self._tau_cap(skeleton, relax)
        in_flight = least_in_flight(relax, minima, cap)
        if in_flight is None:
            return self.cutoff
        best = -math.inf
        families = [(spread_weights(relax), 0.0)]
        if relax.slope > 0 and relax.num_stages > 1:
            families.append((additive_weights(relax), relax.slope * least_bottleneck(minima, relax.num_stages)))
        for base, constant in families:
            work = memory_relaxation(relax, base, in_flight)
            tighten(work, lambda p, c=constant: self._offer(skeleton, relax, p) - c, self.space.tolerance / 4)  # type: ignore[misc]
            best = max(best, work.bound + constant)
            if best >= self.cutoff:
                break
        return best

    def _layouts(self, skeleton: Skeleton, relax: Relaxation) -> float:
        """Bound all layouts by their blocks, improve the best one, then work on those that can still win."""
        rules = self._rules(skeleton, relax)
        optimist = make_optimist(self.space.blocks(skeleton, relax.problem), rules, relax.prices)
        bound = optimist.bound()
        if bound >= self.cutoff:
            return bound
        self._improve(skeleton, relax)
        found = itertools.islice(optimist.layouts(self._additive(relax), self.cutoff), MOST_LAYOUTS)
        layouts = sorted(found, key=lambda entry: (entry[0], entry[1].starts, entry[1].recompute))
        if len(layouts) == MOST_LAYOUTS:
            return bound
        budget = LAYOUT_WORK // (relax.problem.num_entries + LAYOUT_OVERHEAD)
        best = self.cutoff
        for index, (least, layout) in enumerate(layouts):
            if least >= self.cutoff or index >= budget or self.space.out_of_time:
                return min(best, least)
            best = min(best, max(least, self._close(skeleton, relax, layout)))
        return best

    def _close(self, skeleton: Skeleton, relax: Relaxation, layout: Layout) -> float:
        """Exact bound of one layout (as far as the tolerance asks)."""
        work = make_layout_bound(relax.problem, layout, relax.prices, relax.memory_bytes)
        tighten(work, lambda p: self._offer(skeleton, relax, p), self.space.tolerance / 4)
        if work.bound < self.cutoff:
            close_gap(work, lambda p: self._offer(skeleton, relax, p), self.space.tolerance / 4)
        return work.bound

    def _improve(self, skeleton: Skeleton, relax: Relaxation) -> None:
        """Alternate between the best cuts of given shardings and the best shardings of given cuts."""
        seen: set[Layout] = set()
        for _ in range(IMPROVE_ROUNDS):
            plan = self.space.plans.get(skeleton)
            if plan is None or plan.layout in seen or relax.num_stages == 1:
                return
            seen.add(plan.layout)
            work = make_layout_bound(relax.problem, plan.layout, relax.prices, relax.memory_bytes)
            tighten(work, lambda p: self._offer(skeleton, relax, p), self.space.tolerance / 4)
