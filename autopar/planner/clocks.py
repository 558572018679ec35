"""Clocks of a plan's instructions: least energy within a deadline, by the prices of its stages at every clock.

Instructions are forwards, backwards and the update of every pipeline rank. A rank of an interleaved pipeline has
forwards and backwards of its own for each chunk: `F`, `F.1`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from autopar.cost.predict import predict, transfers_s
from autopar.cost.stages import StageCost, stage_costs
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.clocks import ClockedStep, ClockPoint, StageClocks
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.serialize_graph import graph_hash
from autopar.ir.solution import Decisions
from autopar.ir.timeline import BACKWARD, FORWARD, STEP, schedule_actions
from autopar.planner.choose import Chooser
from autopar.planner.plan import capture_graph
from autopar.planner.request import Progress, choose_target, say_nothing
from autopar.planner.rival import check_unchanged, policy_pins, request_of
from autopar.search.clocks import Arc, ClockOption, ClockPlan, ClockPlanner, ClockProblem, Instruction

SHORTEST_S = 1e-9
"""Stands for work of no time, which an instruction cannot have."""
SLACKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares by which deadlines lie beyond the fastest step."""


def plan_instruction_clocks(
    plan: Plan, *, deadline_s: float | None = None, straggler_s: float = 0.0, progress: Progress | None = None
) -> ClockedStep:
    """Choose the clock of every instruction of a plan.

    Args:
        deadline_s: latest end of the step; None: that of the plan at its own clocks.
        straggler_s: the step does not end before this time.

    Raises:
        InputError: the plan's GPUs cannot be locked, or are of several types.
        InfeasibleError: the deadline is shorter than the fastest step.
        PlanMismatchError: the model is no longer the one that the plan was made for.
    """
    decisions = plan.decisions
    if plan.cluster.description is not None:
        raise InputError("clocks are planned for pipelines on one type of GPU")
    graph = capture_graph(plan.model.source, plan.model.options, plan.model.batch_size, progress).graph
    check_unchanged(plan, graph_hash(graph))
    request = replace(request_of(plan, policy_pins(plan)), clocks="auto")
    tables = Chooser(graph, request, choose_target(request), progress or say_nothing).tables(request.pins)
    if not isinstance(tables, CostTables) or len(tables.clocks_hz) == 1:
        raise InputError(f"the clocks of {plan.cluster.gpu} cannot be locked, or nothing is known of them")
    planner = ClockPlanner(clock_problem(tables, decisions), straggler_s=straggler_s)
    if deadline_s is None:
        deadline_s = max(_own_deadline(plan, tables), planner.fastest_s, straggler_s) * (1 + 1e-9)
    return _planned(planner, plan, deadline_s, straggler_s)


def _own_deadline(plan: Plan, tables: CostTables) -> float:
    """The step that the plan promises at its own clocks, without pacing."""
    return predict(tables, replace(plan.decisions, pace_s=0.0)).step_time_s.value


def _planned(planner: ClockPlanner, plan: Plan, deadline_s: float, straggler_s: float) -> ClockedStep:
    problem, fastest_s = planner.problem, planner.fastest_s
    chosen = planner.plan(deadline_s)
    least_s = max(fastest_s, straggler_s) * (1 + 1e-12)
    points = planner.frontier(least_s * (1 + slack) for slack in SLACKS)
    return ClockedStep(
        sum(problem.gpus_per_stage),
        len(problem.instructions),
        fastest_s,
        highest_energy_j(problem, max(fastest_s, straggler_s)),
        _point(chosen),
        tuple(_stage_clocks(problem, chosen)),
        tuple(_point(point) for point in points),
        _shares(plan.predicted.step_time_s),
        _shares(plan.predicted.energy_j),
    )


def _shares(quantity: Quantity) -> tuple[float, float]:
    return quantity.low / quantity.value, quantity.high / quantity.value


def _point(found: ClockPlan) -> ClockPoint:
    return ClockPoint(found.deadline_s, found.makespan_s, found.energy_j, found.bound_j)


def _stage_clocks(problem: ClockProblem, found: ClockPlan) -> Iterator[StageClocks]:
    for stage in range(len(problem.gpus_per_stage)):
        kinds = dict.fromkeys(i.kind for i in problem.instructions if i.stage == stage and i.kind != STEP)
        for kind in kinds:
            own = [
                (instruction.microbatch, clock)
                for instruction, clock in zip(problem.instructions, found.clocks_mhz, strict=True)
                if (instruction.stage, instruction.kind) == (stage, kind)
            ]
            yield StageClocks(stage, kind, tuple(m for m, _ in own), tuple(clock for _, clock in own))


def highest_energy_j(problem: ClockProblem, step_s: float) -> float:
    """Joules of a step of `step_s` seconds with every instruction at its fastest option."""
    blocked_w = problem.blocked_w_per_gpu
    total = blocked_w * sum(problem.gpus_per_stage) * step_s
    for instruction in problem.instructions:
        options = problem.options[instruction.stage, instruction.kind]
        fastest = min(options, key=lambda option: (option.time_s, option.energy_j))
        total += problem.gpus_per_stage[instruction.stage] * (fastest.energy_j - blocked_w * fastest.time_s)
    return total


def clock_problem(tables: CostTables, decisions: Decisions) -> ClockProblem:
    """Instructions of the plan's schedule; each has the prices of its stage at every clock of the cluster.

    The update at the end of a stage keeps the highest clock. Joules of a microbatch divide between forward and backward
    like their seconds.
    """
    table = tables.table(decisions.mesh, decisions.num_microbatches)
    figures = tables.clock_figures(decisions.mesh, decisions.num_microbatches)
    if table is None or figures is None:
        raise InputError(f"the batch does not divide into {decisions.num_microbatches} microbatches")
    by_clock = [stage_costs(tables, figures.at(table, c), decisions) for c in range(len(tables.clocks_hz))]
    ranks, blocked_w = decisions.num_ranks, tables.cluster.blocked_w
    options: dict[tuple[int, str], tuple[ClockOption, ...]] = {}
    for stage in range(len(decisions.stages)):
        own = [costs[stage] for costs in by_clock]
        for kind in (FORWARD, BACKWARD):
            options[stage % ranks, _name(kind, stage // ranks)] = tuple(
                _option(hz, cost, kind, blocked_w) for hz, cost in zip(tables.clocks_hz, own, strict=True)
            )
    for rank in range(ranks):
        own = [by_clock[0][stage] for stage in range(rank, len(decisions.stages), ranks)]
        step_s = max(sum(cost.step_s for cost in own), SHORTEST_S)
        joules = sum(cost.step_j for cost in own) + blocked_w * step_s
        options[rank, STEP] = (ClockOption(tables.clocks_hz[0] / 1e6, step_s, joules),)
    instructions, arcs = _graph(decisions, transfers_s(tables, by_clock[0], decisions))
    return ClockProblem(instructions, arcs, options, blocked_w, (decisions.mesh.num_devices,) * ranks)


def _name(kind: str, chunk: int) -> str:
    return f"{kind}.{chunk}" if chunk else kind


def _option(clock_hz: float, cost: StageCost, kind: str, blocked_w: float) -> ClockOption:
    both_s = cost.forward_s + cost.backward_s
    time_s = max(cost.forward_s if kind == FORWARD else cost.backward_s, SHORTEST_S)
    share = time_s / both_s if both_s else 0.0
    return ClockOption(clock_hz / 1e6, time_s, cost.microbatch_j * share + blocked_w * time_s)


def _graph(decisions: Decisions, delays_s: Sequence[float]) -> tuple[tuple[Instruction, ...], tuple[Arc, ...]]:
    """Instructions in the order of each rank, and what each waits for: the one before it, and its operand."""
    ranks, count = decisions.num_ranks, decisions.num_microbatches
    instructions: list[Instruction] = []
    arcs: list[Arc] = []
    place: dict[tuple[int, str, int], int] = {}
    for rank in range(ranks):
        first = len(instructions)
        for action in schedule_actions(rank, ranks, count, decisions.schedule, interleave=decisions.interleave):
            place[action.chunk * ranks + rank, action.kind, action.microbatch] = len(instructions)
            kind = STEP if action.kind == STEP else _name(action.kind, action.chunk)
            instructions.append(Instruction(rank, kind, action.microbatch))
        arcs += [Arc(i, i + 1) for i in range(first, len(instructions) - 1)]
    for (stage, kind, microbatch), position in place.items():
        if kind == FORWARD and stage > 0:
            arcs.append(Arc(place[stage - 1, kind, microbatch], position, delays_s[stage - 1]))
        if kind == BACKWARD and stage + 1 < len(decisions.stages):
            arcs.append(Arc(place[stage + 1, kind, microbatch], position, delays_s[stage]))
    return tuple(instructions), tuple(arcs)
