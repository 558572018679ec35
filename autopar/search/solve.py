"""search: the entry. From table source, objective, limits and pins to a Solution with bound and gap."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from autopar.errors import InputError, SolverLimitError
from autopar.ir.cost import CostTable, TableSource
from autopar.ir.mixed import MixedSource
from autopar.ir.pipeline import FORWARD_ONLY, SCHEDULES
from autopar.ir.solution import RECOMPUTE, Alternative, Decisions, Limits, Objective, Pins, Solution
from autopar.search.evaluate import fixed_power_w
from autopar.search.infeasible import no_plan_error
from autopar.search.shared import Plan, Progress, Space
from autopar.search.space import Skeleton, Skeletons, list_skeletons
from autopar.search.stages import Question
from autopar.search.untied import further_gap, untied_bound

SOLVER = "elimination + dynamic programme + HiGHS"
NUM_ALTERNATIVES = 8
NUM_UNMET = 3
NUM_CONTENDERS, CONTENDER_SHARE = 3, 0.05
"""Plans of other skeletons that are handed on for simulation, and how much worse than the best they may be."""
MOST_EFFORT = 3_000.0
"""Refinements (see `stages.EFFORT`) after which a search without a time limit ends with the gap it has."""
PACE_SLACK = 1e-9
SEARCH_SHARE = 0.999
"""Part of the gap that the search may leave: all but rounding."""


def search(
    tables: TableSource,
    objective: Objective,
    *,
    pins: Pins,
    limits: Limits | None = None,
    use_all: bool = False,
    gap_tolerance: float = 1e-3,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    max_microbatches: int | None = None,
    untied: bool = False,
) -> Solution:
    """Find the best plan over the space of `space`.

    Args:
        tables: prices; also names the graph and the device limits.
        objective: what is minimised.
        pins: user restrictions; `schedule` None means 1f1b.
        limits: deadline, energy budget and power caps.
        use_all: use exactly `device.num_gpus` devices.
        gap_tolerance: relative gap at which the search stops.
        time_limit_s: wall-clock limit; the incumbent and its bound are returned when it strikes. None: the search ends
            after MOST_EFFORT, which depends on no clock.
        progress: called with a dict after each refinement; `incumbent` is the best objective so far, `least` a bound
            on all plans.
        max_microbatches: largest M tried.
        untied: also bound what identical blocks with strategies of their own could gain: `gap_parts["tying"]`.

    Raises:
        InputError: if the pins describe an empty space or an unknown name.
        InfeasibleError: if no plan fits into memory or keeps the limits; proven.
        SolverLimitError: if the time limit struck before any plan was found.
    """
    started = time.monotonic()
    check_request(pins, gap_tolerance)
    limits = Limits() if limits is None else limits
    skeletons = list_skeletons(
        tables,
        pins,
        use_all=use_all,
        max_microbatches=max_microbatches,
        clocks=useful_clocks(tables, objective, limits),
    )
    deadline = None if time_limit_s is None else started + time_limit_s
    space = make_space(tables, skeletons, pins, limits, gap_tolerance * SEARCH_SHARE)
    space.deadline_s, space.progress = deadline, progress
    effort = MOST_EFFORT if time_limit_s is None else math.inf
    question = Question(space, objective, limits, most_effort=effort)
    answer = question.run()
    if answer.plan is None:
        if space.out_of_time:
            raise SolverLimitError(f"no plan found within {time_limit_s} s; allow more time or pin more choices")
        raise no_plan_error(space, pins, limits, skeletons, use_all=use_all, max_microbatches=max_microbatches)
    solution = solution_of(question, gap_tolerance, time.monotonic() - started)
    if not untied or space.mixed is not None:
        return solution
    parts = {**solution.gap_parts, "tying": further_gap(solution, untied_bound(space, question))}
    return replace(solution, gap_parts=parts, wall_s=time.monotonic() - started)


def useful_clocks(tables: TableSource, objective: Objective, limits: Limits) -> tuple[int, int]:
    """First and last clock worth looking at: none but the highest where joules and watts do not matter."""
    watts = (limits.energy_j, limits.average_power_w, limits.peak_power_w)
    if objective.kind == "time" and all(limit is None for limit in watts):
        return 0, 0
    return 0, len(tables.clocks_hz) - 1


def make_space(tables: TableSource, skeletons: Skeletons, pins: Pins, limits: Limits, tolerance: float) -> Space:
    """A fresh space; a peak power limit shapes its problems, and leaves out what draws more even while it waits.

    Raises:
        InputError: if the cluster does not support a limit.
    """
    _check_limits(tables, limits)
    cap_w = limits.peak_power_w
    if cap_w is not None:
        skeletons = skeletons.only(lambda s: fixed_power_w(tables.device, s.num_gpus) <= cap_w)
    return Space(tables, pins.schedule or "1f1b", tolerance, skeletons, peak_power_w=limits.peak_power_w)


def solution_of(question: Question, gap_tolerance: float, wall_s: float) -> Solution:
    """The answered question's best plan, with its figures as paced.

    Raises:
        ValueError: if the question has no plan.
    """
    space, plan = question.space, question.plan
    if plan is None:
        raise ValueError("a question without a plan has no solution")
    aim = question.aim_of(plan.skeleton)
    time_s = aim.paced_s(plan.figures.time_s, space.dynamic_j(plan))
    value = question.value
    bound = min([*question.bounds.values(), value])
    gap = (value - bound) / abs(value) if value else 0.0
    is_paced = time_s > plan.figures.time_s * (1 + PACE_SLACK)
    return Solution(
        decisions=replace(decisions_of(space, plan), pace_s=time_s if is_paced else 0.0),
        time_s=time_s,
        energy_j=space.dynamic_j(plan) + aim.fixed_w * time_s,
        objective=question.objective,
        objective_value=value,
        bound=bound,
        status="optimal" if gap <= gap_tolerance else "feasible",
        solver=SOLVER,
        wall_s=wall_s,
        alternatives=_alternatives(question, plan),
        contenders=_contenders(question, plan),
        is_interrupted=question.is_interrupted,
        gap_parts={"sharding and stages": gap} if gap > 0 else {},
    )


def check_request(pins: Pins, gap_tolerance: float) -> None:
    """Raises InputError for pins or a tolerance out of range."""
    if not 0 <= gap_tolerance < 1:
        raise InputError(f"gap tolerance {gap_tolerance} is not in [0, 1)")
    if pins.schedule not in (None, FORWARD_ONLY, *SCHEDULES):
        raise InputError(f"unknown schedule {pins.schedule!r}; known: {', '.join(SCHEDULES)}")
    if pins.recompute is not None and pins.recompute not in RECOMPUTE:
        raise InputError(f"unknown recompute {pins.recompute!r}; known: {', '.join(RECOMPUTE)}")
    for name in ("dp", "tp", "pp", "num_microbatches"):
        value = getattr(pins, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} is below 1")


def _check_limits(tables: TableSource, limits: Limits) -> None:
    if isinstance(tables, MixedSource) and limits.peak_power_w is not None:
        raise InputError("a peak power limit is for clusters of one type of GPU; --power-cap limits the average")


def decisions_of(space: Space, plan: Plan) -> Decisions:
    """Spell a plan out by op, value and parameter name."""
    clock = plan.skeleton.clocks[0]
    problem = space.uncapped(plan.skeleton.sizes, plan.skeleton.num_microbatches, clock)
    if problem is None:
        raise SolverLimitError("the table of the chosen mesh is gone")
    clock_hz = space.source.clocks_hz[clock] if clock else 0.0
    return spell_out(problem.table, plan, space.schedule, clock_hz, _names(space))


def spell_out(
    table: CostTable, plan: Plan, schedule: str, clock_hz: float = 0.0, names: Sequence[str] = ()
) -> Decisions:
    """Decisions of a choice of strategies: every concrete op, hub and parameter of tied nodes gets its own entry.

    `names` are those of the types of a mixed cluster.
    """
    found: dict[str, dict[str, object]] = {"op": {}, "hub": {}, "param": {}}
    for node, p in zip(table.nodes, plan.choice, strict=True):
        for name in node.names:
            found[node.kind][name.removeprefix(f"{node.kind}:")] = node.choices[p]
    ordered = {kind: dict(sorted(entries.items())) for kind, entries in found.items()}
    return Decisions(
        mesh=table.mesh,
        num_microbatches=table.num_microbatches,
        schedule=schedule,
        stages=plan.layout.choices(clock_hz, names),
        ops=ordered["op"],  # type: ignore[arg-type]
        hubs=ordered["hub"],  # type: ignore[arg-type]
        parameters=ordered["param"],  # type: ignore[arg-type]
    )


def _contenders(question: Question, best: Plan) -> tuple[Decisions, ...]:
    """The best plans of other (mesh, K) that are nearly as good, unpaced."""
    found: dict[tuple[tuple[int, ...], int], Plan] = {}
    for value, plan in sorted(question.plans.values(), key=lambda entry: (entry[0], entry[1].skeleton)):
        if value <= question.value * (1 + CONTENDER_SHARE):
            found.setdefault((plan.skeleton.sizes, plan.skeleton.num_stages), plan)
    found.pop((best.skeleton.sizes, best.skeleton.num_stages), None)
    return tuple(decisions_of(question.space, plan) for plan in list(found.values())[:NUM_CONTENDERS])


def _alternatives(question: Question, best: Plan) -> tuple[Alternative, ...]:
    """The best plan of each other (mesh, K), best first, then the skeletons that fell out by bound alone."""
    found: dict[tuple[tuple[int, ...], int], tuple[float, Plan]] = {}
    for value, plan in sorted(question.plans.values(), key=lambda entry: (entry[0], entry[1].skeleton)):
        found.setdefault((plan.skeleton.sizes, plan.skeleton.num_stages), (value, plan))
    chosen, names = (best.skeleton.sizes, best.skeleton.num_stages), _names(question.space)
    listed = []
    for key, (value, plan) in found.items():
        if key == chosen:
            continue
        worse = value / question.value - 1 if question.value else 0.0
        listed.append(
            Alternative(
                plan.skeleton.describe(names),
                plan.figures.time_s,
                plan.figures.energy_j,
                value,
                question.bounds.get(plan.skeleton),
                f"{worse:.1%} worse than the plan chosen",
            )
        )
    unmet = _unmet(question.bounds, {key[1] for key in found}, names)
    return tuple(listed[: NUM_ALTERNATIVES - len(unmet)] + unmet)


def _names(space: Space) -> tuple[str, ...]:
    """Of the types of a mixed cluster."""
    return () if space.mixed is None else space.mixed.names


def _unmet(bounds: dict[Skeleton, float], seen: set[int], names: Sequence[str]) -> list[Alternative]:
    """For numbers of stages without any plan met: the skeleton of least bound, and why nothing came of it."""
    least: dict[int, Skeleton] = {}
    for skeleton, bound in sorted(bounds.items(), key=lambda entry: (entry[1], entry[0])):
        if skeleton.num_stages not in seen and bound > -math.inf:
            least.setdefault(skeleton.num_stages, skeleton)
    listed = []
    for skeleton in list(least.values())[:NUM_UNMET]:
        bound = bounds[skeleton]
        fits = math.isfinite(bound)
        reason = "no plan of it can beat its bound" if fits else "no plan of it fits"
        listed.append(Alternative(skeleton.describe(names), None, None, None, bound if fits else None, reason))
    return listed
