"""The time-energy frontier of a model: each point of the search simulated and made a plan of its own.

Its ends are what `planner.plan` makes of least time and of least energy, so variants that no search knows (interleaved
pipelines, recompute policies) stand there, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.errors import InfeasibleError, InputError
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.solution import Objective, Solution
from autopar.planner.choose import Choice, Chooser
from autopar.planner.plan import assemble_plan, capture_graph
from autopar.planner.request import PlanRequest, Progress, choose_target, say_nothing
from autopar.search.frontier import frontier

ENDS = ("time", "energy")
"""Objectives whose plans end the frontier."""
SEARCHES = 1 + len(ENDS)
"""That share a time limit."""


@dataclass(frozen=True)
class Traced:
    """Plans by rising time, none dominated when simulated.

    Attributes:
        num_dropped: plans found that the simulation shows dominated, or that break a limit when simulated.
        complete: no further point lies between them at the search's resolution.
    """

    plans: tuple[Plan, ...]
    num_dropped: int
    complete: bool


def trace_frontier(
    source: str,
    options: Mapping[str, str],
    request: PlanRequest,
    num_points: int = 40,
    progress: Progress | None = None,
) -> Traced:
    """Trace the frontier of a model under the request's pins and limits; its objective is not used.

    Each plan's objective is what its point was found by: energy, and time of the fastest.

    Raises:
        InputError, CaptureError: the model or a number is wrong.
        InfeasibleError: no plan fits or keeps the limits.
    """
    request = replace(request, with_baselines=False, objective=Objective("energy"))
    if request.time_limit_s is not None:
        request = replace(request, time_limit_s=request.time_limit_s / SEARCHES)
    target = choose_target(request)
    captured = capture_graph(source, options, request.batch_size, progress)
    if request.pins.meshes:
        raise InputError("--pin meshes=...: for plans of one objective; the search of frontiers knows equal stages")
    chooser = Chooser(captured.graph, request, target, progress or say_nothing)
    tables = chooser.tables(request.pins)
    chooser.progress(f"tracing the frontier of {captured.graph.name} on up to {request.num_gpus} GPUs")
    found = frontier(
        tables,
        pins=chooser.searched(request.pins),
        limits=request.limits,
        use_all=request.use_all,
        num_points=num_points,
        time_limit_s=request.time_limit_s,
    )
    reference = ModelReference(source, dict(options), "", 0)

    def plan_of(solution: Solution) -> Plan | None:
        candidate = chooser.candidate(tables, solution.decisions, formula=solution.objective_value)
        if not chooser.is_kept(candidate):
            return None
        plan = assemble_plan(captured.graph, reference, request, target, Choice(candidate, solution, ()))
        if solution.objective_value == solution.time_s:
            plan = replace(plan, objective=Objective("time"))
        return replace(plan, notes=(*plan.notes, *captured.notes))

    plans = [plan for solution in found.points if (plan := plan_of(solution)) is not None]
    ends: list[Plan] = []
    for kind in ENDS:
        own = replace(request, objective=Objective(kind))
        try:
            choice = replace(chooser, request=own).choose(tables)
        except InfeasibleError:
            # The search's best for this end breaks a limit when simulated.
            continue
        end = assemble_plan(captured.graph, reference, own, target, choice)
        if all(plan.decisions != end.decisions for plan in plans):
            ends.append(replace(end, notes=(*end.notes, *captured.notes)))
    kept = undominated([*plans, *ends])
    return Traced(kept, len(found.points) + len(ends) - len(kept), found.complete)


def undominated(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """By rising simulated time, each thriftier than all before."""
    kept, least_j = [], math.inf
    for plan in sorted(plans, key=lambda p: (p.predicted.step_time_s.value, p.predicted.energy_j.value)):
        if plan.predicted.energy_j.value < least_j:
            kept.append(plan)
            least_j = plan.predicted.energy_j.value
    return tuple(kept)
