"""Frontier: the plans of least energy under every deadline, between the fastest plan and the thriftiest.

The ends are the single-objective plans. Between two neighbours the deadline whose answer is not known yet lies in a
range (low, high]: at `low` the faster one is the answer, at `high` the slower one. A question at the middle of the
range finds a plan between them, also one off the convex hull, or halves the range; the widest range is asked next. All
questions share one space: its tables, the planes that bound skeletons, and the plans met, which are the next
question's first incumbents.

With all ranges narrower than `resolution`, every plan of the space has a listed one that needs no more energy, beyond
that point's own gap (at most the tolerance where its status is `optimal`), and at most 1 + `resolution` of its time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from autopar.errors import InputError, SolverLimitError
from autopar.ir.cost import TableSource
from autopar.ir.solution import Limits, Objective, Pins, Solution
from autopar.search.infeasible import no_plan_error
from autopar.search.shared import Progress, Space
from autopar.search.solve import SEARCH_SHARE, check_request, make_space, solution_of, useful_clocks
from autopar.search.space import list_skeletons
from autopar.search.stages import Question

END_TOLERANCE = 1e-3
"""Relative gap of the two ends, that of a single plan."""
MOST_LAYOUTS = 0
"""Skeletons closed layout by layout per plan between the ends: none, so that under tight memory, where multipliers
leave a gap, a plan between the ends keeps one above the tolerance."""
SAME_SHARE = 1e-9
"""Relative difference in energy below which two plans count as one."""


@dataclass(frozen=True)
class FrontierResult:
    """`points` by rising time, none dominated.

    `complete`: every range is narrower than the resolution asked for; else the number of points or the time ran out.
    """

    points: tuple[Solution, ...]
    complete: bool


@dataclass(frozen=True)
class _Range:
    """Deadlines whose answer is unknown: `fast` answers up to `low_s`, `slow` at `high_s`."""

    low_s: float
    high_s: float
    fast: Solution
    slow: Solution

    @property
    def width(self) -> float:
        return math.log(self.high_s / self.low_s) if self.low_s > 0 else math.inf

    @property
    def promise(self) -> float:
        """Area between the two plans, relative to both, in which others may lie."""
        return self.width * math.log(max(self.fast.energy_j / self.slow.energy_j, 1.0))


def frontier(
    tables: TableSource,
    *,
    pins: Pins,
    limits: Limits | None = None,
    use_all: bool = False,
    num_points: int = 32,
    resolution: float = 5e-3,
    gap_tolerance: float = 1e-2,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    max_microbatches: int | None = None,
) -> FrontierResult:
    """The time-energy frontier of the space of `space`.

    Args:
        num_points: plans wanted at most, >= 1; the ends are always there.
        resolution: relative width of the deadlines between two plans below which no further is looked for.
        gap_tolerance: relative gap in energy of the plans between the ends.

    The other arguments, and errors, are those of `solve.search`.
    """
    started = time.monotonic()
    check_request(pins, gap_tolerance)
    if num_points < 1 or not resolution > 0:
        raise InputError(f"a frontier needs at least 1 point and a resolution above 0, got {num_points}, {resolution}")
    limits = Limits() if limits is None else limits
    clocks = useful_clocks(tables, Objective("energy"), limits)
    skeletons = list_skeletons(tables, pins, use_all=use_all, max_microbatches=max_microbatches, clocks=clocks)
    space = make_space(tables, skeletons, pins, limits, min(END_TOLERANCE, gap_tolerance) * SEARCH_SHARE)
    space.deadline_s = None if time_limit_s is None else started + time_limit_s
    space.progress = progress
    fastest, thrifty = _ask(space, "time", limits), _ask(space, "energy", limits)
    if fastest is None or thrifty is None:
        if space.out_of_time:
            raise SolverLimitError(f"no plan found within {time_limit_s} s; allow more time or pin more choices")
        raise no_plan_error(space, pins, limits, skeletons, use_all=use_all, max_microbatches=max_microbatches)
    space.tolerance = gap_tolerance * SEARCH_SHARE
    fast = _ask(space, "energy", replace(limits, deadline_s=fastest.time_s)) or fastest
    points, complete = _between(space, limits, (fast, thrifty), num_points, math.log1p(resolution))
    return FrontierResult(_undominated([fastest, *points]), complete)


def _between(
    space: Space, limits: Limits, ends: tuple[Solution, Solution], num_points: int, width: float
) -> tuple[list[Solution], bool]:
    """Plans from end to end, and whether no range is wider than `width`."""
    points = list(ends)
    open_ranges = [_Range(ends[0].time_s, ends[1].time_s, *ends)]
    while True:
        open_ranges = [r for r in open_ranges if r.width > width and r.promise > 0]
        if not open_ranges:
            return points, True
        if len(points) >= num_points or space.out_of_time:
            return points, False
        chosen = max(open_ranges, key=lambda r: (r.promise, r.low_s))
        open_ranges.remove(chosen)
        middle_s = math.sqrt(chosen.low_s * chosen.high_s)
        found = _ask(space, "energy", replace(limits, deadline_s=middle_s), MOST_LAYOUTS)
        if found is None or found.energy_j >= chosen.fast.energy_j * (1 - SAME_SHARE):
            open_ranges.append(replace(chosen, low_s=middle_s))
            continue
        if found.energy_j <= chosen.slow.energy_j * (1 + SAME_SHARE):
            open_ranges.append(replace(chosen, high_s=found.time_s, slow=found))
            continue
        points.append(found)
        open_ranges.append(replace(chosen, high_s=found.time_s, slow=found))
        open_ranges.append(replace(chosen, low_s=middle_s, fast=found))


def _ask(space: Space, kind: str, limits: Limits, most_layouts: int | None = None) -> Solution | None:
    started = time.monotonic()
    question = Question(space, Objective(kind), limits, most_layouts=most_layouts)
    answer = question.run()
    if answer.plan is None:
        return None
    return solution_of(question, space.tolerance / SEARCH_SHARE, time.monotonic() - started)


def _undominated(points: list[Solution]) -> tuple[Solution, ...]:
    """By rising time, each thriftier than all before."""
    kept: list[Solution] = []
    least = math.inf
    for point in sorted(points, key=lambda p: (p.time_s, p.energy_j)):
        if point.energy_j < least:
            kept.append(point)
            least = point.energy_j
    return tuple(kept)
