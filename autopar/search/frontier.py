"""Frontier: the plans of least energy under every deadline, between the fastest plan and the thriftiest.

From the thriftiest plan on, each question asks for the least energy under a deadline a step below the last answer, so
that plans off the convex hull are found too. All questions share one space: its tables, the planes that bound
skeletons, and the plans met, which are the next question's first incumbents.

With the step delta, every plan of the space has a listed one that needs no more energy (beyond the tolerance) and at
most 1 / (1 - delta) of its time.
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


@dataclass(frozen=True)
class FrontierResult:
    """`points` by rising time, none dominated; `complete` is False if the time limit struck. `step` is delta."""

    points: tuple[Solution, ...]
    step: float
    complete: bool


def frontier(
    tables: TableSource,
    *,
    pins: Pins,
    limits: Limits | None = None,
    use_all: bool = False,
    num_points: int = 40,
    gap_tolerance: float = 1e-2,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    max_microbatches: int | None = None,
) -> FrontierResult:
    """The time-energy frontier of the space of `space`.

    Args:
        num_points: how many deadlines divide the way from the slowest to the fastest plan, in equal ratios; >= 1.
        gap_tolerance: relative gap in energy of the plans between the ends.

    The other arguments, and errors, are those of `solve.search`.
    """
    started = time.monotonic()
    check_request(pins, gap_tolerance)
    if num_points < 1:
        raise InputError(f"a frontier needs at least 1 point, got {num_points}")
    limits = Limits() if limits is None else limits
    clocks = useful_clocks(tables, Objective("energy"), limits)
    skeletons = list_skeletons(tables, pins, use_all=use_all, max_microbatches=max_microbatches, clocks=clocks)
    space = make_space(tables, skeletons, pins, limits, min(END_TOLERANCE, gap_tolerance) * SEARCH_SHARE)
    space.deadline_s = None if time_limit_s is None else started + time_limit_s
    space.progress = progress
    fast, thrifty = _ask(space, "time", limits), _ask(space, "energy", limits)
    if fast is None or thrifty is None:
        if space.out_of_time:
            raise SolverLimitError(f"no plan found within {time_limit_s} s; allow more time or pin more choices")
        raise no_plan_error(space, pins, limits)
    space.tolerance = gap_tolerance * SEARCH_SHARE
    ratio = max(thrifty.time_s / fast.time_s, 1.0)
    step = 1 - ratio ** (-1 / num_points)
    points = [thrifty, *_descend(space, limits, thrifty.time_s, fast.time_s, step), fast]
    return FrontierResult(_undominated(points), step, not space.out_of_time)


def _descend(space: Space, limits: Limits, slowest_s: float, fastest_s: float, step: float) -> list[Solution]:
    found = []
    deadline_s = slowest_s * (1 - step)
    while step > 0 and deadline_s > fastest_s and not space.out_of_time:
        answer = _ask(space, "energy", replace(limits, deadline_s=deadline_s))
        if answer is None:
            break
        found.append(answer)
        deadline_s = min(deadline_s, answer.time_s) * (1 - step)
    last = _ask(space, "energy", replace(limits, deadline_s=fastest_s))
    return [*found, last] if last is not None else found


def _ask(space: Space, kind: str, limits: Limits) -> Solution | None:
    started = time.monotonic()
    question = Question(space, Objective(kind), limits)
    answer = question.run()
    if answer.plan is None:
        return None
    return solution_of(question, max(space.tolerance / SEARCH_SHARE, 0.0), time.monotonic() - started)


def _undominated(points: list[Solution]) -> tuple[Solution, ...]:
    """By rising time, each thriftier than all before."""
    kept: list[Solution] = []
    least = math.inf
    for point in sorted(points, key=lambda p: (p.time_s, p.energy_j)):
        if point.energy_j < least:
            kept.append(point)
            least = point.energy_j
    return tuple(kept)
