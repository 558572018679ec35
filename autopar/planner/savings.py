"""Savings: the energy of a plan against the plan of least time, split by what made the difference.

The way from one to the other frees one choice after the other; each plan on it is found as `autopar plan` would, by the
objective of the plan asked about, under its limits, and is simulated like any other:

1. the plan of least time;
2. parallelisation: the best plan on as many GPUs, at their highest clocks;
3. number of GPUs: the best plan on at most as many as were allowed, at their highest clocks;
4. clocks: the plan asked about, with a clock per stage.

Every space contains the one before, so where a search finds less than the one before it, that plan stands. Beyond, and
beside it on the plan of least time, stand the clocks per instruction of `planner.clocks`, which no plan file holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autopar.cost.hardware import Cluster
from autopar.errors import InfeasibleError, InputError, PlanMismatchError
from autopar.ir.graph import OpGraph
from autopar.ir.inference import require_training
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.savings import CLOCKS, NUM_GPUS, PARALLELISATION, STAGE_CLOCKS, Savings, SavingStep
from autopar.ir.serialize import parse_plan
from autopar.ir.solution import Objective, Pins
from autopar.planner.choose import EQUAL
from autopar.planner.clocks import ONE_MESH, ClockPass, clock_tables
from autopar.planner.profile import NO_PROFILE
from autopar.planner.recall import Command, Finished, finished_plan, graph_of
from autopar.planner.request import CLOCKS as CLOCK_POLICIES
from autopar.planner.request import PlanRequest, Progress, choose_target, say_nothing
from autopar.planner.rival import check_unchanged, made_under, policy_pins, request_of
from autopar.report.frontier import point_words

FASTEST, ALONE, ALONE_LATER = "least time", "clocks alone, in its time", "clocks alone, in the plan's time"


@dataclass(frozen=True)
class _Finder:
    """Finds plans of one model as `autopar plan` does."""

    plan: Plan
    use_cache: bool
    progress: Progress

    def __call__(self, request: PlanRequest) -> Plan:
        return self._found(request)[1]

    def with_graph(self, request: PlanRequest) -> tuple[Plan, OpGraph]:
        """The plan and the graph that it is of."""
        finished, found = self._found(request)
        return found, graph_of(self._command(request), finished, self.progress)

    def _found(self, request: PlanRequest) -> tuple[Finished, Plan]:
        finished = finished_plan(self._command(request), self.progress)
        found = parse_plan(finished.plan_text)
        check_unchanged(self.plan, found.model.graph_hash)
        return finished, found

    def _command(self, request: PlanRequest) -> Command:
        return Command(self.plan.model.source, self.plan.model.options, request, self.use_cache)


def split_savings(
    plan: Plan, pins: Pins | None = None, *, use_cache: bool = True, progress: Progress | None = None
) -> Savings:
    """The savings of a plan.

    Args:
        pins: under which the plan was made; None: those that its file names.
        use_cache: take plans that were made before from the cache.

    Raises:
        InputError: the plan is for inference or one of least time, or its GPUs are of several types.
        PlanMismatchError: the model or the prices are no longer those that the plan was made with.
        InfeasibleError: no plan fits under these pins.
    """
    require_training(plan, "autopar explain --savings")
    request = _request(plan, made_under(plan) if pins is None else pins)
    find = _Finder(plan, use_cache, progress or say_nothing)
    fastest, graph = find.with_graph(replace(request, objective=Objective("time")))
    highest = replace(request, clocks="max")
    own = replace(highest, num_gpus=fastest.decisions.num_gpus, use_all=True)
    way = _Way(fastest)
    way = way.with_search(PARALLELISATION, own, find)
    way = way.with_search(NUM_GPUS, highest, find)
    way = way.with_plan(STAGE_CLOCKS, plan)
    beyond, alone, remarks = _by_instruction(plan, fastest, request, graph)
    return Savings(
        objective=plan.objective.kind,
        fastest=_step(FASTEST, fastest, 0.0),
        steps=way.steps,
        beyond=beyond,
        alone=alone,
        remarks=(*way.remarks, *remarks),
    )


def _request(plan: Plan, pins: Pins) -> PlanRequest:
    """The request that the plan answers, with the clocks and the profile that its prices tell."""
    if plan.objective.kind == "time":
        raise InputError("this is the plan of least time, which savings are counted from; make one of least energy")
    if plan.cluster.description is not None:
        raise InputError("savings are split for clusters of one type of GPU")
    asked = request_of(plan, pins)
    for profile in (None, NO_PROFILE):
        for clocks in CLOCK_POLICIES:
            request = replace(asked, clocks=clocks, profile=profile)
            if choose_target(request).input_hash == plan.cluster.input_hash:
                return request
    raise PlanMismatchError(
        "the plan was priced by other numbers than there are now (device file, profile or power limit); make it again"
    )


@dataclass(frozen=True)
class _Way:
    """Plans so far; `last` is the best of them."""

    last: Plan
    steps: tuple[SavingStep, ...] = ()
    remarks: tuple[str, ...] = ()

    def with_search(self, cause: str, request: PlanRequest, find: _Finder) -> _Way:
        """One step further; the last plan stands where the search finds nothing better and could have found it."""
        try:
            found = find(request)
        except InfeasibleError as error:
            reason = str(error).splitlines()[0]
            return replace(self, steps=(*self.steps, SavingStep(cause, "", request.num_gpus, None, None, 0.0, reason)))
        is_allowed = not any(stage.clock_hz for stage in self.last.decisions.stages)
        if is_allowed and _value(self.last, request.objective) <= _value(found, request.objective):
            found = self.last
        return self._with(cause, found)

    def with_plan(self, cause: str, plan: Plan) -> _Way:
        """The last step, to the plan asked about."""
        excess = _value(plan, plan.objective) / _value(self.last, plan.objective) - 1
        if excess <= plan.solver.gap + EQUAL:
            return self._with(cause, plan)
        better = f"{point_words(self.last)} at the highest clocks is better than the plan by {excess:.2%}"
        why = "the plan was made under pins (give them with --pin), or its search was cut short"
        return replace(self._with(cause, plan), remarks=(*self.remarks, f"{better}: {why}"))

    def _with(self, cause: str, plan: Plan) -> _Way:
        saved_j = self.last.predicted.energy_j.value - plan.predicted.energy_j.value
        return replace(self, last=plan, steps=(*self.steps, _step(cause, plan, saved_j)))


def _value(plan: Plan, objective: Objective) -> float:
    predicted = plan.predicted
    return objective.value(predicted.step_time_s.value, predicted.energy_j.value, plan.decisions.num_gpus)


def _step(cause: str, plan: Plan, saved_j: float) -> SavingStep:
    predicted, num_gpus = plan.predicted, plan.decisions.num_gpus
    return SavingStep(cause, point_words(plan), num_gpus, predicted.step_time_s, predicted.energy_j, saved_j)


def _by_instruction(
    plan: Plan, fastest: Plan, request: PlanRequest, graph: OpGraph
) -> tuple[SavingStep | None, tuple[SavingStep, ...], tuple[str, ...]]:
    """Clocks per instruction on both plans."""
    cluster = choose_target(replace(request, clocks="auto")).cluster
    if not isinstance(cluster, Cluster) or len(cluster.clocks_hz) == 1:
        return None, (), (f"the clocks of {plan.cluster.gpu} cannot be locked, or nothing is known of them",)

    if plan.decisions.stage_meshes or fastest.decisions.stage_meshes:
        return None, (), (f"clocks of instructions are planned for pipelines {ONE_MESH}",)

    def pass_of(found: Plan) -> ClockPass:
        return ClockPass.of(clock_tables(graph, replace(request, pins=policy_pins(found))), found.decisions)

    own = pass_of(plan)
    first = own if fastest.decisions == plan.decisions else pass_of(fastest)
    beyond = _clocked(CLOCKS, plan, own, 0.0)
    later_s = plan.predicted.step_time_s.value
    return beyond, (_clocked(ALONE, fastest, first, 0.0), _clocked(ALONE_LATER, fastest, first, later_s)), ()


def _clocked(cause: str, plan: Plan, found: ClockPass, deadline_s: float) -> SavingStep:
    """The plan with a clock per instruction, within the deadline or its own step, whichever is later."""
    before, own = plan.predicted, found.own_figures(plan.decisions.pace_s)
    step_s, joules = found.choose(deadline_s, plan.decisions.pace_s)
    return SavingStep(
        cause,
        point_words(plan),
        plan.decisions.num_gpus,
        _like(before.step_time_s, before.step_time_s.value + step_s - own[0]),
        _like(before.energy_j, before.energy_j.value + joules - own[1]),
        own[1] - joules,
    )


def _like(quantity: Quantity, value: float) -> Quantity:
    """Another value with the label and the relative range of a figure."""
    ratio = value / quantity.value
    return replace(quantity, value=value, low=quantity.low * ratio, high=quantity.high * ratio)
