"""Clocks of a plan's instructions: least energy within a deadline, by the prices of its stages at every clock.

Instructions are forwards, backwards and the update of every pipeline rank. A rank of an interleaved pipeline has
forwards and backwards of its own for each chunk: `F`, `F.1`, ... Where the schedule splits backward, `W` is its second
half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.cost.passes import costs_at
from autopar.cost.predict import predict, transfers_s
from autopar.cost.stages import StageCost
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.clocks import ClockedStep, ClockPoint, StageClocks
from autopar.ir.graph import OpGraph
from autopar.ir.pipeline import splits_backward
from autopar.ir.plan import Plan, Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.serialize_graph import graph_hash
from autopar.ir.solution import Decisions
from autopar.ir.timeline import BACKWARD, FORWARD, STEP, WEIGHT
from autopar.planner.choose import Chooser
from autopar.planner.plan import capture_graph
from autopar.planner.request import PlanRequest, Progress, choose_target, say_nothing
from autopar.planner.rival import check_unchanged, policy_pins, request_of
from autopar.search.clocks import ClockOption, ClockPlan, ClockPlanner, ClockProblem, pipeline_graph, work_name

SHORTEST_S = 1e-9
"""Stands for work of no time, which an instruction cannot have."""
SLACKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares by which deadlines lie beyond the fastest step."""
LAST = " last"
"""Ends the kind of the backward, or its second half, of the last microbatch."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """Who keeps the others waiting.

    Attributes:
        step_s: the step does not end before this time.
        ratio: of the straggler's time over what it should take; at least 1.
        rank: the pipeline rank that is slowed down, all its GPUs; None: somebody outside the pipelines that are
            planned, such as another data-parallel replica, whose whole step takes `ratio` times as long.

    Raises:
        InputError: for a ratio below 1.
    """

    step_s: float = 0.0
    ratio: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise InputError(f"a straggler takes at least as long as it should: expected 1 or more, got {self.ratio:g}")


def plan_instruction_clocks(
    plan: Plan,
    *,
    deadline_s: float | None = None,
    straggler: Straggler | None = None,
    progress: Progress | None = None,
) -> ClockedStep:
    """Choose the clock of every instruction of a plan.

    Args:
        deadline_s: latest end of the step; None: that of the plan at its own clocks, or the straggler's end if later.
        straggler: whose own GPUs stay at their highest clocks.

    Raises:
        InputError: the plan's GPUs cannot be locked, or are of several types; or it has no such rank.
        InfeasibleError: the deadline is shorter than the fastest step.
        PlanMismatchError: the model is no longer the one that the plan was made for.
    """
    if plan.cluster.description is not None:
        raise InputError("clocks are planned for pipelines on one type of GPU")
    if plan.decisions.stage_meshes:
        raise InputError(f"clocks are planned for pipelines {ONE_MESH}")
    straggler = straggler or Straggler()
    ranks = plan.decisions.num_ranks
    if straggler.rank is not None and not 0 <= straggler.rank < ranks:
        raise InputError(f"the plan has pipeline ranks 0 to {ranks - 1}, not {straggler.rank}")
    graph = capture_graph(plan.model.source, plan.model.options, plan.model.batch_size, progress).graph
    check_unchanged(plan, graph_hash(graph))
    found = ClockPass.of(clock_tables(graph, request_of(plan, policy_pins(plan)), progress), plan.decisions)
    end_s = straggler.step_s
    if straggler.rank is not None:
        found = found.slowed(straggler)
    elif straggler.ratio > 1:
        end_s = max(end_s, straggler.ratio * found.own_s)
    return _planned(found, deadline_s, replace(straggler, step_s=end_s))


def clock_tables(graph: OpGraph, request: PlanRequest, progress: Progress | None = None) -> CostTables:
    """Prices at every clock, under the request's pins. Raises InputError where clocks cannot be locked."""
    request = replace(request, clocks="auto")
    tables = Chooser(graph, request, choose_target(request), progress or say_nothing).tables(request.pins)
    if not isinstance(tables, CostTables) or len(tables.clocks_hz) == 1:
        raise InputError(f"the clocks of {request.gpu} cannot be locked, or nothing is known of them")
    return tables


ONE_MESH = "whose stages have one mesh"


@dataclass(frozen=True)
class ClockPass:
    """The choice of clocks for the instructions of one plan.

    Joules of a `ClockProblem` are those of GPUs and hosts but for sends between stages, which no clock changes.

    Attributes:
        planner: of the problem with every clock.
        own: figures of the plan at its own clocks, its steps not paced.
        own_problem: with the plan's own clocks alone.
        own_s: step of the own problem; but for a straggler that of `own`.
        sends_j: what the problems do not count.
    """

    planner: ClockPlanner
    own: Prediction
    own_problem: ClockProblem
    own_s: float
    sends_j: float

    @staticmethod
    def of(tables: CostTables, decisions: Decisions) -> ClockPass:
        """The pass for a plan. Raises InputError if the batch does not divide."""
        own = predict(tables, replace(decisions, pace_s=0.0))
        own_s, problem = own.step_time_s.value, clock_problem(tables, decisions, free=False)
        sends_j = own.energy_j.value - highest_energy_j(problem, own_s)
        return ClockPass(ClockPlanner(clock_problem(tables, decisions)), own, problem, own_s, sends_j)

    def slowed(self, straggler: Straggler) -> ClockPass:
        """The pass where one rank takes longer, at its highest clocks, with the dynamic joules of those."""
        problems = [_slowed(problem, straggler) for problem in (self.planner.problem, self.own_problem)]
        own_s = ClockPlanner(problems[1]).fastest_s
        return replace(self, planner=ClockPlanner(problems[0]), own_problem=problems[1], own_s=own_s)

    @property
    def own_j(self) -> float:
        """What the problem counts of the step at the plan's own clocks."""
        return highest_energy_j(self.own_problem, self.own_s)

    def deadline_s(self, straggler_s: float = 0.0) -> float:
        """The end of the plan's step at its own clocks, or the straggler's, a rounding error later."""
        return max(self.own_s, self.planner.fastest_s, straggler_s) * (1 + 1e-9)

    def choose(self, deadline_s: float, pace_s: float = 0.0) -> tuple[float, float]:
        """Seconds and joules (GPUs and hosts) of a step with a clock per instruction.

        Args:
            deadline_s: latest end, or that at the plan's own clocks if it is later.
            pace_s: between the starts of two steps at least.
        """
        planner = ClockPlanner(self.planner.problem, straggler_s=pace_s) if pace_s else self.planner
        chosen = planner.plan(max(deadline_s, self.deadline_s(pace_s)))
        step_s = max(chosen.makespan_s, pace_s)
        return step_s, chosen.energy_j + self.sends_j

    def own_figures(self, pace_s: float = 0.0) -> tuple[float, float]:
        """Seconds and joules (GPUs and hosts) of a step at the plan's own clocks, the steps `pace_s` apart."""
        step_s = max(self.own_s, pace_s)
        return step_s, highest_energy_j(self.own_problem, step_s) + self.sends_j


def _slowed(problem: ClockProblem, straggler: Straggler) -> ClockProblem:
    """The problem with one rank slowed down at its fastest options."""
    options = dict(problem.options)
    for key, own in problem.options.items():
        if key[0] == straggler.rank:
            fastest = min(own, key=lambda option: (option.time_s, option.energy_j))
            later_s = (straggler.ratio - 1) * fastest.time_s
            energy_j = fastest.energy_j + problem.blocked_w_per_gpu * later_s
            options[key] = (ClockOption(fastest.clock_mhz, fastest.time_s + later_s, energy_j),)
    return replace(problem, options=options)


def _planned(found: ClockPass, deadline_s: float | None, straggler: Straggler) -> ClockedStep:
    planner, own, end_s = found.planner, found.own, straggler.step_s
    if end_s:
        planner = ClockPlanner(planner.problem, straggler_s=end_s)
    problem, fastest_s = planner.problem, planner.fastest_s
    chosen = planner.plan(found.deadline_s(end_s) if deadline_s is None else deadline_s)
    least_s = max(fastest_s, end_s)
    points = planner.frontier(least_s * (1 + 1e-12) * (1 + slack) for slack in SLACKS)
    return ClockedStep(
        num_gpus=sum(problem.gpus_per_stage),
        num_instructions=len(problem.instructions),
        fastest_s=fastest_s,
        highest_j=highest_energy_j(problem, least_s),
        own_s=found.own_s,
        own_j=highest_energy_j(found.own_problem, max(found.own_s, end_s)),
        straggler_s=end_s,
        slow_rank=straggler.rank,
        slow_ratio=straggler.ratio,
        chosen=_point(chosen),
        stages=tuple(_stage_clocks(problem, chosen)),
        points=tuple(_point(point) for point in points),
        time_range=_shares(own.step_time_s),
        energy_range=_shares(own.energy_j),
    )


def _shares(quantity: Quantity) -> tuple[float, float]:
    return quantity.low / quantity.value, quantity.high / quantity.value


def _point(found: ClockPlan) -> ClockPoint:
    return ClockPoint(found.deadline_s, found.makespan_s, found.energy_j, found.bound_j)


def _stage_clocks(problem: ClockProblem, found: ClockPlan) -> Iterator[StageClocks]:
    for stage in range(len(problem.gpus_per_stage)):
        clocks: dict[str, list[tuple[int, float]]] = {}
        for instruction, clock in zip(problem.instructions, found.clocks_mhz, strict=True):
            if instruction.stage == stage and instruction.kind != STEP:
                kind = instruction.kind.removesuffix(LAST)
                clocks.setdefault(kind, []).append((instruction.microbatch, clock))
        for kind, own in clocks.items():
            yield StageClocks(stage, kind, tuple(m for m, _ in own), tuple(clock for _, clock in own))


def highest_energy_j(problem: ClockProblem, step_s: float) -> float:
    """Joules of a step of `step_s` seconds with every instruction at its fastest option."""
    blocked_w, total = problem.blocked_w_per_gpu, problem.waiting_w * step_s
    for instruction in problem.instructions:
        options = problem.options[instruction.stage, instruction.kind]
        fastest = min(options, key=lambda option: (option.time_s, option.energy_j))
        total += problem.gpus_per_stage[instruction.stage] * (fastest.energy_j - blocked_w * fastest.time_s)
    return total


def clock_problem(tables: CostTables, decisions: Decisions, *, free: bool = True) -> ClockProblem:
    """Instructions of the plan's schedule; each has the prices of its stage at every clock of the cluster.

    Without `free`, only those of its stage's own clock: then the one choice that there is costs what `predict` says.
    Joules of a microbatch divide between forward and backward like their seconds. The update keeps the highest clock,
    and begins as late as synchronisation beside the last backward lets it at any of the clocks.
    """
    choices = _choices(tables, decisions, free=free)
    first = [own[0][1] for own in choices]
    ranks, blocked_w = decisions.num_ranks, tables.cluster.blocked_w
    instructions, arcs = pipeline_graph(
        ranks,
        decisions.num_microbatches,
        decisions.schedule,
        transfer_s=transfers_s(tables, first, decisions),
        interleave=decisions.interleave,
        exposed_s=[max(cost.times.exposed_s for _, cost in own) for own in choices],
    )
    options: dict[tuple[int, str], tuple[ClockOption, ...]] = {}
    works = (BACKWARD, WEIGHT) if splits_backward(decisions.schedule, ranks) else (BACKWARD,)
    for stage, own in enumerate(choices):
        for work in (FORWARD, *works, works[-1] + LAST):
            kind = work_name(work.removesuffix(LAST), stage // ranks) + work[1:]
            options[stage % ranks, kind] = tuple(_option(hz, cost, work, blocked_w) for hz, cost in own)
    for rank in range(ranks):
        options[rank, STEP] = (_update(tables.clocks_hz[0], first[rank::ranks], blocked_w),)
    last = decisions.num_microbatches - 1
    named = tuple(
        replace(i, kind=i.kind + LAST) if i.kind.startswith(works[-1]) and i.microbatch == last else i
        for i in instructions
    )
    cluster, gpus = tables.cluster, (decisions.mesh.num_devices,) * ranks
    hosts_w = cluster.spec.host_w_per_node * cluster.nodes(decisions.num_gpus)
    return ClockProblem(named, arcs, options, blocked_w, gpus, hosts_w)


def _choices(tables: CostTables, decisions: Decisions, *, free: bool) -> list[list[tuple[float, StageCost]]]:
    """Of every stage: clocks, the highest first, with its prices there; all of them, or its own alone."""
    every = tables.clocks_hz
    clocks = [every if free else (stage.clock_hz or every[0],) for stage in decisions.stages]
    used = sorted({hz for own in clocks for hz in own}, reverse=True)
    prices = {hz: costs_at(tables, decisions, every.index(hz)) for hz in used}
    return [[(hz, prices[hz][stage]) for hz in own] for stage, own in enumerate(clocks)]


def _option(clock_hz: float, cost: StageCost, work: str, blocked_w: float) -> ClockOption:
    """The last backward, beside which gradients are synchronised, takes its own time and the joules of any other."""
    both_s, weight_s = cost.forward_s + cost.backward_s, cost.times.weight_s
    usual_s = {FORWARD: cost.forward_s, WEIGHT: weight_s}.get(work[0], cost.backward_s - weight_s)
    later_s = 0.0
    if work.endswith(LAST) and cost.times.last_backward_s is not None:
        later_s = cost.times.last_backward_s - cost.backward_s
    time_s = max(usual_s + later_s, SHORTEST_S)
    share = usual_s / both_s if both_s else 0.0
    return ClockOption(clock_hz / 1e6, time_s, cost.microbatch_j * share + blocked_w * time_s)


def _update(clock_hz: float, costs: Sequence[StageCost], blocked_w: float) -> ClockOption:
    """What a rank does once a step, after its last backward and what synchronisation leaves to wait for."""
    step_s = max(sum(cost.step_s - cost.times.exposed_s for cost in costs), SHORTEST_S)
    return ClockOption(clock_hz / 1e6, step_s, sum(cost.step_j for cost in costs) + blocked_w * step_s)
