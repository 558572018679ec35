"""Stages: best-first search over skeletons for one question, i.e. one objective under limits.

Each skeleton carries a lower bound on the objective, and the one with the least is refined next, level by level
(`refine`): ideal, coarser, table, memory, layouts. Bounds are planes in the plane of step time and dynamic energy
(`aim`); a plain question needs one direction, others add directions where the corner of the least objective lies.

A skeleton is closed when its bound reaches incumbent * (1 - tolerance); the least bound of all closed skeletons is the
answer's. One that stands for a range of clocks is split in two after its table.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.ir.cost import Array
from autopar.ir.solution import Limits, Objective
from autopar.search.aim import Aim, Plane
from autopar.search.cuts import Prices
from autopar.search.evaluate import Layout
from autopar.search.first import waiting
from autopar.search.mixed import make_refiner
from autopar.search.ranges import Stack
from autopar.search.refine import Asker, Limited, Refiner, coarser_bound, ideal_bounds, range_bound
from autopar.search.shared import Plan, Space
from autopar.search.space import Skeleton

ROUNDING = 1e-9
MOST_PLANES = 24
"""Planes made per skeleton for one question."""
MOST_STALLED = 3
"""Directions in a row that may move the bound by less than a quarter of the tolerance."""
LEVELS = ("coarser", "table", "memory", "layouts")
EFFORT = (0.1, 1.0, 1.0, 4.0)
"""What a refinement of each level counts, about as long as it takes; unlike a clock it is the same on every machine."""


def _halves(skeleton: Skeleton) -> tuple[Skeleton, Skeleton]:
    """The faster and the slower half of a range of clocks."""
    first, last = skeleton.clocks
    middle = (first + last) // 2
    return replace(skeleton, clocks=(first, middle)), replace(skeleton, clocks=(middle + 1, last))


@dataclass(frozen=True)
class Answer:
    """`bound` <= objective of every plan; `value` is the best plan's, inf if none was found."""

    value: float
    bound: float
    plan: Plan | None
    complete: bool


@dataclass
class Question:
    """Minimises an objective under limits over the skeletons of a space.

    Attributes:
        bounds: per skeleton, of the objective.
        plans: best plan met of each skeleton.
        is_interrupted: Ctrl-C came while a plan was known; the best one is the answer.
        most_effort: refinements, by the weights of EFFORT, after which the best plan known is the answer.
        most_layouts: skeletons whose layouts are closed at most; the others keep the bound they have. None: all.
        assumed: per skeleton and direction, the coarser bound, until its table has been held against it.
    """

    space: Space
    objective: Objective
    limits: Limits = field(default_factory=Limits)
    bounds: dict[Skeleton, float] = field(default_factory=dict)
    value: float = math.inf
    plan: Plan | None = None
    plans: dict[Skeleton, tuple[float, Plan]] = field(default_factory=dict)
    is_interrupted: bool = False
    most_effort: float = math.inf
    effort: float = 0.0
    most_layouts: int | None = None
    num_layouts: int = 0
    aims: dict[tuple[int, tuple[int, ...]], Aim] = field(default_factory=dict)
    assumed: dict[tuple[Skeleton, Prices], float] = field(default_factory=dict)

    @property
    def cutoff(self) -> float:
        """A bound at least this high closes a skeleton."""
        return self.value * (1 - self.space.tolerance) if math.isfinite(self.value) else math.inf

    def aim(self, num_gpus: int, kinds: tuple[int, ...] = ()) -> Aim:
        """Of plans on so many devices; on a mixed cluster with stages of these types."""
        key = num_gpus, kinds
        if key not in self.aims:
            self.aims[key] = Aim(self.objective, self.limits, num_gpus, self.space.fixed_w(*key))
        return self.aims[key]

    def aim_of(self, skeleton: Skeleton) -> Aim:
        return self.aim(skeleton.num_gpus, skeleton.kinds)

    def value_of(self, plan: Plan) -> float:
        """Objective of a plan, inf where it breaks a limit."""
        return self.aim_of(plan.skeleton).value(plan.figures.time_s, self.space.dynamic_j(plan))

    def run(self) -> Answer:
        """Best-first over all skeletons."""
        for plan in self.space.met:
            self._consider(plan)
        scales = (self.space.ideal_scale, self.space.coarser_scale)
        heap: list[tuple[float, int, Skeleton]] = []
        queue, complete = waiting(self.space.skeletons, self._first()), True
        while heap or queue.least() < math.inf:
            while queue.least() < math.inf and (not heap or queue.least() <= heap[0][0]):
                bound, skeleton = queue.take()
                heapq.heappush(heap, (max(bound, self._known(skeleton)), 0, skeleton))
            bound, level, skeleton = heapq.heappop(heap)
            self.bounds[skeleton] = bound
            if bound >= self.cutoff or self.space.out_of_time or self._is_spent:
                complete = bound >= self.cutoff
                self.bounds |= {s: b for b, _, s in heap}
                break
            try:
                refined = max(bound, self._refine(skeleton, level))
            except KeyboardInterrupt as stop:
                if self.plan is None or type(stop) is not KeyboardInterrupt:
                    raise
                self.is_interrupted, complete = True, False
                self.bounds |= {s: b for b, _, s in heap}
                break
            self.effort += EFFORT[level]
            self._report(skeleton, level, refined, bound)
            if scales != (self.space.ideal_scale, self.space.coarser_scale):
                return self.run()
            if level == len(LEVELS) - 1 or refined >= self.cutoff:
                self.bounds[skeleton] = refined
            elif LEVELS[level] == "table" and skeleton.clocks[0] != skeleton.clocks[1]:
                del self.bounds[skeleton]
                for half in _halves(skeleton):
                    heapq.heappush(heap, (max(refined, self._quick(half)), 0, half))
            else:
                heapq.heappush(heap, (refined, level + 1, skeleton))
        self.bounds |= queue.rest()
        best_bound = min([*self.bounds.values(), self.value])
        return Answer(self.value, best_bound, self.plan, complete)

    @property
    def _is_spent(self) -> bool:
        """Whether a plan is known and the effort is used up."""
        return self.effort >= self.most_effort and self.plan is not None

    def _report(self, skeleton: Skeleton, level: int, bound: float, least: float) -> None:
        if self.space.progress is not None:
            self.space.progress(
                {
                    "skeleton": skeleton.describe(),
                    "level": LEVELS[level],
                    "bound": bound,
                    "incumbent": self.value,
                    "least": least,
                }
            )

    def _consider(self, plan: Plan) -> None:
        """Keep the plan if it is the best of its skeleton, and of all."""
        value = self.value_of(plan)
        if not math.isfinite(value):
            return
        known = self.plans.get(plan.skeleton)
        if known is None or value < known[0]:
            self.plans[plan.skeleton] = value, plan
        if value < self.value:
            self.value, self.plan = value, plan

    def _met(self, plan: Plan) -> None:
        self.space.record(plan)
        self._consider(plan)

    def _planes(self, skeleton: Skeleton) -> list[Plane]:
        return self.space.planes.setdefault(skeleton, [])

    def _bound(self, skeleton: Skeleton, more: list[Plane]) -> float:
        return self.aim_of(skeleton).bound(self._relevant(skeleton) + more)

    def _relevant(self, skeleton: Skeleton) -> list[Plane]:
        """Planes made so far; of a plain question only its own direction matters."""
        aim, planes = self.aim_of(skeleton), self._planes(skeleton)
        return [p for p in planes if p.prices == aim.natural] if aim.is_plain else list(planes)

    def _first(self) -> Array:
        """A first bound of every skeleton of the space."""
        space, skeletons = self.space, self.space.skeletons
        if space.first is None or not len(skeletons) or not self.aim(1).is_plain:
            return np.array([self._quick(s) for s in skeletons], dtype=np.float64)
        num_gpus = skeletons.stages * space.first.devices[skeletons.mesh_index]
        sizes, of = np.unique(num_gpus, return_inverse=True)
        naturals = [self.aim(n).natural for n in sizes.tolist()]
        weights = np.array([prices.step_weight for prices in naturals], dtype=np.float64)[of]
        return space.ideal_scale * space.first.levels(weights, naturals[0].beta)

    def _known(self, skeleton: Skeleton) -> float:
        """What earlier questions found out, where a question is plain (`_quick` looks for itself)."""
        if not self.aim_of(skeleton).is_plain:
            return -math.inf
        return max((plane.level for plane in self._relevant(skeleton)), default=-math.inf)

    def _quick(self, skeleton: Skeleton) -> float:
        """A first bound without any corner: the objective's own direction, and whether a limit is out of reach."""
        planes = [*self._ideal_planes(skeleton), *self._relevant(skeleton)]
        return self.aim_of(skeleton).quick(planes) if planes else -math.inf

    def _ideal_planes(self, skeleton: Skeleton) -> tuple[Plane, ...]:
        space = self.space
        if space.ideal is None:
            return ()
        probes = self.aim_of(skeleton).probes
        key = (skeleton, probes, space.ideal_scale)
        if key not in space.ideal_planes:
            found = (Plane(prices, max(ideal_bounds(space, skeleton, prices))) for prices in probes)
            space.ideal_planes[key] = tuple(found)
        return space.ideal_planes[key]

    def _refine(self, skeleton: Skeleton, level: int) -> float:
        if level == 0:
            return self._assumed(skeleton)
        if skeleton.clocks[0] != skeleton.clocks[1]:
            stack = self.space.stack(skeleton.sizes, skeleton.num_microbatches)
            return math.inf if stack is None else self._planes_of(skeleton, lambda p: self._range(skeleton, stack, p))
        problem = self.space.problem(skeleton)
        if problem is None:
            return math.inf
        refiner = make_refiner(self.space, skeleton, problem, self._asker(skeleton))
        if level == 1:
            return self._planes_of(skeleton, lambda p: self._table(refiner, p))
        if level == 3 and self.most_layouts is not None and self.num_layouts >= self.most_layouts:
            return -math.inf
        self.num_layouts += level == 3
        found = self._memory(refiner) if level == 2 else self._layouts(refiner)
        return min(found, self.cutoff) if math.isfinite(self.cutoff) else found

    def _memory(self, refiner: Refiner) -> float:
        skeleton = refiner.skeleton
        prices = self.aim_of(skeleton).closest(self._relevant(skeleton), self.cutoff)
        return self._bound(skeleton, [Plane(prices, refiner.memory(refiner.relax(prices)))])

    def _layouts(self, refiner: Refiner) -> float:
        """A product needs layouts closed in several directions, sums in their own."""
        skeleton = refiner.skeleton
        aim = self.aim_of(skeleton)
        prices = aim.closest(self._relevant(skeleton), self.cutoff)
        if self.objective.is_linear:
            cases = refiner.layouts(refiner.relax(prices), refiner.relax(aim.natural))
            return min(self._bound(skeleton, [plane]) for plane in cases)
        closed: list[Plane] = []
        for _ in range(MOST_PLANES):
            relax = refiner.relax(prices)
            closed.append(Plane(prices, min(plane.level for plane in refiner.layouts(relax, relax))))
            planes = self._relevant(skeleton) + closed
            further = aim.next_direction(planes) if aim.bound(planes) < self.cutoff else None
            if further is None or self.space.out_of_time:
                break
            prices = further
        return self._bound(skeleton, closed)

    def _asker(self, skeleton: Skeleton) -> Asker:
        aim = self.aim_of(skeleton)

        def horizon(prices: Prices) -> float:
            return aim.horizon(prices, self._relevant(skeleton), self.cutoff)

        def best_layout() -> Layout | None:
            known = self.plans.get(skeleton)
            return None if known is None else known[1].layout

        def limits() -> Limited:
            return aim.upper_limits(self._relevant(skeleton), self.cutoff)

        return Asker(horizon, self._met, best_layout, limits)

    def _assumed(self, skeleton: Skeleton) -> float:
        """Corner of the ideal and the coarser planes."""
        if self.space.ideal is None:
            return -math.inf
        found = list(self._ideal_planes(skeleton))
        if self._bound(skeleton, found) >= self.cutoff:
            return self._bound(skeleton, found)
        prices = self.aim_of(skeleton).closest(found, self.cutoff)
        bound = coarser_bound(self.space, skeleton, prices)
        self.assumed[skeleton, prices] = bound
        return self._bound(skeleton, [*found, Plane(prices, bound)])

    def _planes_of(self, skeleton: Skeleton, bound: Callable[[Prices], float]) -> float:
        """Planes from a table in every direction that still moves the corner."""
        aim, planes = self.aim_of(skeleton), self._planes(skeleton)
        known = {plane.prices for plane in planes}
        queue = [prices for prices in aim.probes if prices not in known]
        reached, stalled = self._bound(skeleton, []), 0
        for _ in range(MOST_PLANES):
            if not queue:
                further = aim.next_direction(planes) if reached < self.cutoff and stalled < MOST_STALLED else None
                if further is None or further in known:
                    break
                queue.append(further)
            prices = queue.pop(0)
            known.add(prices)
            planes.append(Plane(prices, bound(prices)))
            before, reached = reached, self._bound(skeleton, [])
            if reached >= self.cutoff:
                break
            stalled = stalled + 1 if reached - before <= self.space.tolerance / 4 * abs(reached) else 0
        return reached

    def _table(self, refiner: Refiner, prices: Prices) -> float:
        relax = refiner.relax(prices)
        self._check_assumptions(refiner.skeleton, prices, refiner.spread(relax)[0])
        return refiner.table(relax)

    def _range(self, skeleton: Skeleton, stack: Stack, prices: Prices) -> float:
        """Bound of a range of clocks; its choice becomes a plan at the clock that suits it best."""
        found = range_bound(self.space, skeleton, prices, stack)
        self._check_assumptions(skeleton, prices, found.spread)
        leaf = replace(skeleton, clocks=(found.clock, found.clock))
        problem = self.space.problem(leaf) if found.choice else None
        if problem is not None and problem.kept is stack.problem.kept:
            refiner = Refiner(self.space, leaf, problem, self._asker(leaf))
            refiner.offer(refiner.relax(prices), found.choice)
        return found.bound

    def _check_assumptions(self, skeleton: Skeleton, prices: Prices, spread: float) -> None:
        """Scale the assumed bounds down where a table of this skeleton lies below them."""
        space = self.space
        if space.ideal is None or not math.isfinite(spread):
            return
        ideal = ideal_bounds(space, skeleton, prices)[0]
        coarser = self.assumed.pop((skeleton, prices), -math.inf)
        if spread < ideal * (1 - ROUNDING):
            space.ideal_scale *= max(spread, 0.0) / ideal
        if spread < coarser * (1 - ROUNDING):
            space.coarser_scale *= max(spread, 0.0) / coarser
