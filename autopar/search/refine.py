"""Refine: lower bounds of one skeleton in one direction a T + b D, from cheap to exact.

    ideal     from one-device tables (only in large spaces, see `space.IdealBound`)
    coarser   from a table of the same mesh with fewer microbatches (same assumption)
    table     elimination with spread weights; bottleneck of per-block minima
    memory    the aggregated memory row with a multiplier
    layouts   every cut and recompute pattern that can still win, each with its own multipliers, then HiGHS

The first three hold for every plan of the skeleton. The last two hold for those that could still answer the question
(`Question.horizon`). Choices met on the way become plans by the cut programme (`cuts`), evaluated exactly (`evaluate`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autopar.ir.cost import Array
from autopar.search.aim import Plane
from autopar.search.bounds import LayoutBound, add_limits, make_layout_bound, tighten
from autopar.search.branch import close_gap
from autopar.search.cuts import CutRules, Prices, best_cuts
from autopar.search.evaluate import MEMORY_TOLERANCE, Figures, Layout, evaluate
from autopar.search.kinds import MixedIdeal, price_kinds, time_weights
from autopar.search.optimist import Blocks, make_optimist, pay_vectors
from autopar.search.problem import Problem, Weights
from autopar.search.ranges import Stack, price_range
from autopar.search.relax import (
    Relaxation,
    additive_weights,
    cheapest_sends,
    largest_useful_tau,
    least_in_flight,
    memory_relaxation,
    spread_weights,
    surely_in_flight,
)
from autopar.search.shared import Plan, Space
from autopar.search.space import MODES, Skeleton, least_bottleneck

LAYOUT_WORK = 6_000_000
LAYOUT_OVERHEAD = 20_000
"""A skeleton closes at most LAYOUT_WORK / (strategies + pairs + LAYOUT_OVERHEAD) layouts; the rest keep their bound."""
IMPROVE_ROUNDS = 3
CLOSE_ROUNDS = 12
"""Times that a layout is closed again with a better incumbent's limits (only where a power cap paces plans)."""

Limited = Sequence[tuple[Prices, float]]
Horizon = Callable[[Prices], float]


@dataclass(frozen=True)
class Asker:
    """What a refinement must know of the question, for one skeleton.

    Attributes:
        horizon: most that a direction can be for a plan of interest; falls as plans are met.
        met: told of every plan made.
        best_layout: layout of the best plan met so far.
        limits: upper limits on directions that a plan of interest keeps.
    """

    horizon: Horizon
    met: Callable[[Plan], None]
    best_layout: Callable[[], Layout | None]
    limits: Callable[[], Limited]


@dataclass(frozen=True)
class Refiner:
    """Bounds of one skeleton with a table; see the module docstring."""

    space: Space
    skeleton: Skeleton
    problem: Problem
    asker: Asker

    def relax(self, prices: Prices) -> Relaxation:
        skeleton, space = self.skeleton, self.space
        memory = statistics.fmean(space.memory(skeleton))
        return Relaxation(self.problem, skeleton.num_stages, skeleton.mode, space.schedule, prices, memory)

    def rules(self) -> CutRules:
        skeleton, space = self.skeleton, self.space
        memory = space.memory(skeleton)
        return CutRules(skeleton.num_stages, space.schedule, MODES[skeleton.mode], memory, skeleton.kinds)

    def figures(self, layout: Layout, choice: tuple[int, ...]) -> Figures:
        """Exact figures; `choice` indexes the table's strategies."""
        return evaluate(self.problem.table, self.space.device, layout, choice)

    def blocks(self) -> tuple[Blocks, ...]:
        """Blocks of the problem, one entry per type of device."""
        return (self.space.blocks(self.problem),)

    def offer(self, relax: Relaxation, choice: tuple[int, ...]) -> float:
        """Make the best plan of these shardings in this direction; returns the horizon."""
        space, key = self.space, (self.skeleton, choice, relax.prices)
        if key in space.offered:
            return self.asker.horizon(relax.prices)
        space.offered.add(key)
        found = best_cuts(relax.problem, choice, self.rules(), relax.prices)
        if found is not None:
            layout = found[1]
            original = relax.problem.original(choice)
            figures = self.figures(layout, original)
            if figures.fits(space.memory(self.skeleton)) and math.isfinite(figures.time_s):
                mode = "mixed" if len(set(layout.recompute)) > 1 else "full" if layout.recompute[0] else "none"
                self.asker.met(Plan(replace(self.skeleton, mode=mode), layout, original, figures))
        return self.asker.horizon(relax.prices)

    def spread(self, relax: Relaxation) -> tuple[float, tuple[int, ...] | None]:
        """The bound with spread weights and its choice."""
        weights = spread_weights(relax)
        run = relax.problem.solve(weights)
        return run.value + weights.constant, run.choice

    def table(self, relax: Relaxation) -> float:
        bound, choice = self.spread(relax)
        if choice is None or bound >= self.offer(relax, choice):
            return bound
        if relax.slope == 0 or relax.num_stages == 1:
            return bound
        weights = additive_weights(relax)
        run = relax.problem.solve(weights)
        if run.choice is not None:
            self.offer(relax, run.choice)
        tau = least_bottleneck(self.minima(relax), relax.num_stages)
        return max(bound, run.value + weights.constant + relax.slope * tau)

    def minima(self, relax: Relaxation) -> Array:
        """Least loaded seconds of every block."""
        vectors = pay_vectors(1.0, 0.0, redo=self.skeleton.mode == "full")
        return self.space.blocks(relax.problem).minima(*vectors)

    def _additive(self, relax: Relaxation) -> float:
        weights = additive_weights(relax)
        return relax.problem.solve(weights).value + weights.constant

    def memory(self, relax: Relaxation) -> float:
        minima, horizon = self.minima(relax), self.asker.horizon(relax.prices)
        cap = largest_useful_tau(relax, self._additive(relax), horizon)
        in_flight = least_in_flight(relax, minima, cap)
        if in_flight is None:
            return horizon
        best = -math.inf
        families = [(spread_weights(relax), 0.0)]
        if relax.slope > 0 and relax.num_stages > 1:
            families.append((additive_weights(relax), relax.slope * least_bottleneck(minima, relax.num_stages)))
        for base, constant in families:
            work = memory_relaxation(relax, base, in_flight)
            tighten(work, lambda p, c=constant: self.offer(relax, p) - c, self.space.tolerance / 4)  # type: ignore[misc]
            best = max(best, work.bound + constant)
            if best >= self.asker.horizon(relax.prices):
                break
        return best

    def layouts(self, relax: Relaxation, natural: Relaxation) -> list[Plane]:
        """Planes of which every plan of interest keeps at least one.

        Layouts are bounded and listed by their blocks in the direction of `relax`; those that can still win are
        closed in the direction of `natural` under the question's limits.
        """
        horizon = self.asker.horizon
        optimist = make_optimist(relax.problem, self.blocks(), self.rules(), relax.prices)
        bound = optimist.bound()
        if bound >= horizon(relax.prices):
            return [Plane(relax.prices, bound)]
        self._improve(natural)
        budget = LAYOUT_WORK // (relax.problem.num_entries + LAYOUT_OVERHEAD)
        best = math.inf
        listed = optimist.layouts(self._additive(relax), horizon(relax.prices))
        for index, (least, layout) in enumerate(listed):
            if least >= horizon(relax.prices):
                break
            if layout is None or index >= budget or self.space.out_of_time:
                return [Plane(natural.prices, best), Plane(relax.prices, least)]
            best = min(best, self._close(natural, layout))
        return [Plane(natural.prices, min(best, horizon(natural.prices)))]

    def _close(self, relax: Relaxation, layout: Layout) -> float:
        """Exact bound of one layout under the question's limits (as far as the tolerance asks)."""
        bound = -math.inf
        for _ in range(CLOSE_ROUNDS):
            horizon = self.asker.horizon(relax.prices)
            work = self._layout_bound(relax, layout)
            tighten(work, lambda p: self.offer(relax, p), self.space.tolerance / 4)
            if work.bound < self.asker.horizon(relax.prices):
                close_gap(work, lambda p: self.offer(relax, p), self.space.tolerance / 4)
            bound = max(bound, work.bound)
            now = self.asker.horizon(relax.prices)
            if bound >= now or now >= horizon or self.space.out_of_time:
                break
        return bound

    def _layout_bound(self, relax: Relaxation, layout: Layout) -> LayoutBound:
        work = make_layout_bound(relax.problem, layout, relax.prices, self.space.memory(self.skeleton))
        limits = self.asker.limits()
        if limits:
            add_limits(work, layout, limits)
        return work

    def _improve(self, relax: Relaxation) -> None:
        """Alternate between the best cuts of given shardings and the best shardings of given cuts."""
        seen: set[Layout] = set()
        for _ in range(IMPROVE_ROUNDS):
            layout = self.asker.best_layout()
            if layout is None or layout in seen or relax.num_stages == 1:
                return
            seen.add(layout)
            work = self._layout_bound(relax, layout)
            tighten(work, lambda p: self.offer(relax, p), self.space.tolerance / 4)


@dataclass(frozen=True)
class RangeBound:
    """Bound of a range of clocks, and the clock and choice that look best (no choice: infeasible).

    `spread` is the part without memory, as of `Refiner.spread`.
    """

    bound: float
    spread: float
    clock: int
    choice: tuple[int, ...]


def range_bound(space: Space, skeleton: Skeleton, prices: Prices, stack: Stack) -> RangeBound:
    """Bound of a range of clocks from its table."""
    waits, stages = stack.problem.table.num_microbatches - 1, skeleton.num_stages
    memory = float(space.device.memory_bytes)
    relax = Relaxation(stack.problem, stages, skeleton.mode, space.schedule, prices, memory)
    redo = skeleton.mode == "full"
    found: list[tuple[float, int, tuple[int, ...]]] = []
    spread = math.inf
    slopes = [(1 + waits / stages, 0.0)]
    if relax.slope > 0 and stages > 1:
        vectors = pay_vectors(1.0, 0.0, redo=redo)
        fastest = space.uncapped(skeleton.sizes, skeleton.num_microbatches, skeleton.clocks[0])
        if fastest is not None:
            minima = space.blocks(fastest).minima(*vectors)
            slopes.append((1.0, relax.slope * least_bottleneck(minima, stages)))
    for factor, constant in slopes:
        weight = prices.step_weight * factor
        priced = price_range(stack, skeleton.clocks, stages, time_weight=weight, beta=prices.beta, redo=redo)
        weights = priced.weights(cheapest_sends(relax, weight) + constant)
        work = memory_relaxation(replace(relax, problem=priced.problem), weights, surely_in_flight(relax))
        met: list[tuple[int, ...]] = []
        tighten(work, lambda choice, met=met: met.append(choice) or math.inf, space.tolerance / 4)  # type: ignore[misc]
        if constant == 0:
            spread = min(spread, priced.problem.solve(weights).value + weights.constant)
        if not met:
            return RangeBound(math.inf, spread, 0, ())
        found.append((work.bound, skeleton.clocks[0] + priced.best_clock(met[-1]), met[-1]))
    bound, clock, choice = max(found)
    return RangeBound(bound, spread, clock, choice)


def ideal_bounds(space: Space, skeleton: Skeleton, prices: Prices) -> tuple[float, float]:
    """Spread and bottleneck bounds of perfect splits (see `relax` for both); -inf in small spaces."""
    ideal = space.ideal
    if ideal is None:
        return -math.inf, -math.inf
    if not ideal.fits(skeleton, statistics.fmean(space.memory(skeleton)) * (1 + MEMORY_TOLERANCE)):
        return math.inf, math.inf
    waits, scale = skeleton.num_microbatches - 1, space.ideal_scale
    if isinstance(ideal, MixedIdeal):
        bound = scale * ideal.spread(skeleton, prices)
        return bound, bound
    weight, beta = prices.step_weight, prices.beta
    spread = scale * ideal.pay(skeleton, weight * (1 + waits / skeleton.num_stages), beta)
    if waits == 0 or skeleton.num_stages == 1 or weight == 0:
        return spread, spread
    return spread, scale * (ideal.pay(skeleton, weight, beta) + weight * waits * ideal.slowest_s(skeleton))


def coarser_bound(space: Space, skeleton: Skeleton, prices: Prices) -> float:
    """Spread bound from the finest table already made for this mesh with a divisor of M microbatches."""
    if space.ideal is None:
        return -math.inf
    made = [
        (count, problem)
        for (sizes, count), problem in (space.joints if skeleton.kinds else space.problems).items()
        if sizes == skeleton.sizes
        and problem is not None
        and count < skeleton.num_microbatches
        and skeleton.num_microbatches % count == 0
    ]
    if not made:
        return -math.inf
    count, problem = max(made, key=lambda entry: entry[0])
    key = (skeleton, prices, count)
    if key not in space.coarser:
        space.coarser[key] = _coarser(space, skeleton, prices, count, problem)
    return space.coarser_scale * space.coarser[key]


def _coarser(space: Space, skeleton: Skeleton, prices: Prices, count: int, problem: Problem) -> float:
    """The spread bound of the module's `coarser`, from the problem with `count` microbatches."""
    stages, redo = skeleton.num_stages, skeleton.mode == "full"
    factor = (1 + (skeleton.num_microbatches - 1) / stages) * count / skeleton.num_microbatches
    weight = prices.step_weight * factor
    if space.mixed is not None:
        shrunk = prices.step_weight * count / skeleton.num_microbatches
        weights = time_weights(skeleton, space.mixed.speeds, shrunk)
        network, pay = price_kinds(problem, skeleton.kinds, weights, prices.beta, redo=redo)
        return network.least(pay)
    if skeleton.clocks != (0, 0):
        stack = space.stack(skeleton.sizes, count)
        if stack is None:
            return -math.inf
        priced = price_range(stack, skeleton.clocks, stages, time_weight=weight, beta=prices.beta, redo=redo)
        return priced.problem.least(priced.weights(0.0))
    relax = Relaxation(problem, stages, skeleton.mode, space.schedule, Prices(weight, prices.beta), math.inf)
    return problem.least(Weights(additive_weights(relax).blocks))
