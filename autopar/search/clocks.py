"""The clock of every instruction of a pipeline: least energy within a deadline, with a proven bound.

An instruction (stage, kind, microbatch) runs at one of its options (clock, time, energy). GPUs that wait draw the
blocked power, so a step of T seconds costs

    E = sum over instructions of g (E_o - P_b t_o) + (P_b (sum over stages of g) + P_s) T ,    g = GPUs of the stage

where P_s is drawn whatever the GPUs do (hosts).

The relaxation over the options' convex hulls (`clock_lp`) bounds E from below; its durations are rounded down to real
options, which meets the deadline, and the slack that rounding leaves is put to use (`clock_schedule`).

Extrinsic slack: where the whole step waits for a straggler, plan for the straggler's time with `straggler_s`; blocked
power is then drawn until that time whatever the clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx

from autopar.errors import InfeasibleError, InputError, Remedy
from autopar.ir.pipeline import splits_backward
from autopar.ir.timeline import BACKWARD, FORWARD, STEP, WEIGHT, schedule_actions
from autopar.search.clock_lp import Relaxation, Relaxed, relax
from autopar.search.clock_schedule import Network, fill, improve, repair, round_down, round_to_finishes
from autopar.units import format_seconds

PLAN_TRIES = 300
FRONTIER_TRIES = 60
MOST_VISITS = 150_000
"""Tries times instructions: large pipelines get fewer tries."""
OVERSHOOTS = (4e-4, 8e-4, 2e-4, 12e-4)
"""Shares by which the deadlines of further relaxations lie later."""
MOST_OVERSHOOTS = 2_000
"""Further relaxations times instructions; beyond, a poor plan is worth one more, no other any."""
GOOD_GAP, FAIR_GAP, POOR_GAP = 1e-3, 1.8e-3, 3.5e-3
"""Over the bound: a rounding this good needs no further relaxation in a single plan, in a frontier, in large ones."""
BINDING = 1e-9
"""A relaxed step this share shorter than the deadline does not feel it."""


@dataclass(frozen=True)
class ClockOption:
    """One way to run an instruction: clock in MHz, seconds, joules of one GPU, its idle part included."""

    clock_mhz: float
    time_s: float
    energy_j: float


@dataclass(frozen=True)
class Instruction:
    """`kind`: any name that the options know, such as F and B."""

    stage: int
    kind: str
    microbatch: int


@dataclass(frozen=True)
class Arc:
    """Instruction `before` ends at least `delay_s` before instruction `after` starts (indices)."""

    before: int
    after: int
    delay_s: float = 0.0


@dataclass(frozen=True)
class ClockProblem:
    """Instructions, their order, and the options of each (stage, kind).

    Attributes:
        gpus_per_stage: GPUs that run each stage in step; one entry per stage.
        shared_w: drawn until the step ends, whatever the GPUs do.

    Raises:
        InputError: for missing options, times that are not positive, arcs that name no instruction or form a cycle.
    """

    instructions: tuple[Instruction, ...]
    arcs: tuple[Arc, ...]
    options: Mapping[tuple[int, str], tuple[ClockOption, ...]]
    blocked_w_per_gpu: float
    gpus_per_stage: tuple[int, ...]
    shared_w: float = 0.0

    def __post_init__(self) -> None:
        if not self.instructions:
            raise InputError("a pipeline needs instructions")
        if not (math.isfinite(self.blocked_w_per_gpu) and self.blocked_w_per_gpu >= 0):
            raise InputError(f"blocked power is finite and at least 0 W, not {self.blocked_w_per_gpu}")
        if not (math.isfinite(self.shared_w) and self.shared_w >= 0):
            raise InputError(f"shared power is finite and at least 0 W, not {self.shared_w}")
        for key in sorted({(i.stage, i.kind) for i in self.instructions}):
            if not (0 <= key[0] < len(self.gpus_per_stage) and self.gpus_per_stage[key[0]] > 0):
                raise InputError(f"no GPUs are given for stage {key[0]}")
            if not self.options.get(key):
                raise InputError(f"stage {key[0]} has no options for {key[1]!r}")
            for option in self.options[key]:
                if not (option.time_s > 0 and math.isfinite(option.time_s) and math.isfinite(option.energy_j)):
                    raise InputError(f"stage {key[0]}, {key[1]!r}: times are positive and energies finite: {option}")
        known = range(len(self.instructions))
        for arc in self.arcs:
            if arc.before not in known or arc.after not in known:
                raise InputError(f"{arc} joins instructions outside 0..{len(self.instructions) - 1}")
            if not (arc.delay_s >= 0 and math.isfinite(arc.delay_s)):
                raise InputError(f"a delay is finite and at least 0 s: {arc}")

    @property
    def waiting_w(self) -> float:
        """What the step costs per second besides the work of its instructions."""
        return self.blocked_w_per_gpu * sum(self.gpus_per_stage) + self.shared_w


@dataclass(frozen=True)
class ClockPlan:
    """A choice per instruction. bound_j <= least energy <= energy_j; makespan_s <= deadline_s, exactly."""

    deadline_s: float
    options: tuple[ClockOption, ...]
    makespan_s: float
    energy_j: float
    bound_j: float

    @property
    def clocks_mhz(self) -> tuple[float, ...]:
        return tuple(option.clock_mhz for option in self.options)

    @property
    def gap(self) -> float:
        """(energy - bound) / energy."""
        return max(0.0, self.energy_j - self.bound_j) / self.energy_j if self.energy_j > 0 else 0.0


@dataclass(frozen=True)
class _Effort:
    tries: int
    enough_gap: float


class ClockPlanner:
    """Plans for one pipeline; what does not depend on the deadline is computed once.

    Args:
        problem: the pipeline.
        straggler_s: the step does not end before this time; 0: nobody waits.

    Raises:
        InputError: if the arcs form a cycle.
    """

    def __init__(self, problem: ClockProblem, *, straggler_s: float = 0.0) -> None:
        self._useful = {key: _useful(problem, key) for key in {(i.stage, i.kind) for i in problem.instructions}}
        self.problem = problem
        self._network = _network(problem, self._useful, straggler_s)

    @cached_property
    def _relaxation(self) -> Relaxation:
        return relax(self._network)

    @cached_property
    def fastest_s(self) -> float:
        """The shortest makespan."""
        return self._network.makespan_s([0] * len(self._network.order))

    @cached_property
    def slowest_useful_s(self) -> float:
        """A deadline beyond this one saves nothing in the relaxation."""
        return self._relaxation.solve(math.inf).step_s

    def plan(self, deadline_s: float, *, tries: int = PLAN_TRIES) -> ClockPlan:
        """The plan for one deadline.

        Args:
            deadline_s: latest end of the step.
            tries: of the local improvement; more lower the energy a little.

        Raises:
            InfeasibleError: if the fastest options miss the deadline, or the straggler does.
        """
        relaxed = self._relax(deadline_s)
        choices = self._choose(deadline_s, relaxed, _Effort(tries, GOOD_GAP))
        return self._describe(deadline_s, relaxed, choices)

    def frontier(self, deadlines_s: Iterable[float], *, tries: int = FRONTIER_TRIES) -> tuple[ClockPlan, ...]:
        """One plan per distinct deadline, ascending; energy never rises with the deadline.

        A plan also starts from the plan before and from the relaxation after it, and deadlines that no longer bind cost
        nothing.

        Raises:
            InfeasibleError: as for `plan`.
        """
        ordered = sorted(set(deadlines_s))
        relaxations: list[Relaxed] = []
        for deadline_s in ordered:
            is_loose = bool(relaxations) and not _binds(relaxations[-1], ordered[len(relaxations) - 1])
            relaxations.append(relaxations[-1] if is_loose else self._relax(deadline_s))
        plans: list[ClockPlan] = []
        choices: list[int] | None = None
        for index, (deadline_s, relaxed) in enumerate(zip(ordered, relaxations, strict=True)):
            if index and relaxed is relaxations[index - 1]:
                plans.append(replace(plans[-1], deadline_s=deadline_s))
                continue
            following = relaxations[index + 1 : index + 2]
            near = [other for other in following if other.step_s <= deadline_s * (1 + max(OVERSHOOTS))]
            choices = self._choose(deadline_s, relaxed, _Effort(tries, FAIR_GAP), near=near, previous=choices)
            plans.append(self._describe(deadline_s, relaxed, choices))
        return tuple(plans)

    def _relax(self, deadline_s: float) -> Relaxed:
        need_s = max(self.fastest_s, self._network.least_step_s)
        if not need_s <= deadline_s:
            remedy = Remedy(f"--deadline {_rounded_up(need_s)}", "the fastest clocks meet it")
            need = f"{format_seconds(need_s)} at the fastest clocks"
            raise InfeasibleError("deadline", need, format_seconds(deadline_s), (remedy,))
        return self._relaxation.solve(deadline_s)

    def _choose(
        self,
        deadline_s: float,
        relaxed: Relaxed,
        effort: _Effort,
        *,
        near: Sequence[Relaxed] = (),
        previous: list[int] | None = None,
    ) -> list[int]:
        """The best of several roundings, improved.

        A relaxation for a slightly later deadline can stand closer to real options; sped up until it meets this one, it
        may then beat the rounding of this deadline's own.
        """
        network = self._network
        target_s = deadline_s
        if not _binds(relaxed, deadline_s):
            target_s = min(deadline_s, max(relaxed.step_s * (1 + BINDING), self.fastest_s))
        found = [] if previous is None else [previous, *self._fitted(previous, target_s)]
        for one in (relaxed, *near):
            for start in self._roundings(one):
                found += self._fitted(start, target_s)
        best = min(found, key=network.energy_j)
        if target_s == deadline_s:
            for number, overshoot in enumerate(OVERSHOOTS, start=1):
                is_cheap = number * len(network.order) <= MOST_OVERSHOOTS
                enough_gap = effort.enough_gap if is_cheap else POOR_GAP
                is_good = network.energy_j(best) <= relaxed.bound_j * (1 + enough_gap)
                if is_good or (number > 1 and not is_cheap):
                    break
                later = self._relaxation.solve(deadline_s * (1 + overshoot))
                start = round_down(network, later.durations_s.tolist())
                best = min([best, *self._fitted(start, target_s)], key=network.energy_j)
        return improve(network, best, target_s, min(effort.tries, MOST_VISITS // len(best)))

    def _roundings(self, relaxed: Relaxed) -> tuple[list[int], list[int]]:
        ends_s = (relaxed.starts_s + relaxed.durations_s).tolist()
        return round_down(self._network, relaxed.durations_s.tolist()), round_to_finishes(self._network, ends_s)

    def _fitted(self, start: list[int], target_s: float) -> list[list[int]]:
        """The start sped up to meet the target and slowed down again where it can be, in two orders."""
        fast = list(start)
        repair(self._network, fast, target_s)
        plans = [list(fast), list(fast)]
        for by_rate, plan in zip((False, True), plans, strict=True):
            fill(self._network, plan, target_s, by_rate=by_rate)
        return plans

    def _describe(self, deadline_s: float, relaxed: Relaxed, choices: list[int]) -> ClockPlan:
        instructions = self.problem.instructions
        options = tuple(self._useful[i.stage, i.kind][c] for i, c in zip(instructions, choices, strict=True))
        energy_j = self._network.energy_j(choices)
        makespan_s = self._network.makespan_s(choices)
        return ClockPlan(deadline_s, options, makespan_s, energy_j, min(relaxed.bound_j, energy_j))


def plan_clocks(problem: ClockProblem, deadline_s: float, *, straggler_s: float = 0.0) -> ClockPlan:
    """The plan of least energy within a deadline; errors as for `ClockPlanner`."""
    return ClockPlanner(problem, straggler_s=straggler_s).plan(deadline_s)


def frontier(problem: ClockProblem, deadlines_s: Iterable[float]) -> tuple[ClockPlan, ...]:
    """One plan per distinct deadline, ascending; errors as for `ClockPlanner`."""
    return ClockPlanner(problem).frontier(deadlines_s)


def pipeline_graph(
    num_stages: int,
    num_microbatches: int,
    schedule: str = "1f1b",
    *,
    transfer_s: float | Sequence[float] = 0.0,
    interleave: int = 1,
    exposed_s: Sequence[float] | None = None,
) -> tuple[tuple[Instruction, ...], tuple[Arc, ...]]:
    """Instructions of a pipeline schedule and their order: along each stage, and from stage to stage.

    Kinds are F and B, and W where the schedule splits backward; of further chunks of an interleaved stage F.1, B.1, ...
    (`work_name`).

    Args:
        transfer_s: seconds to send from one stage (chunk) to the next, or back: one for all, or one per pair.
        exposed_s: per stage (chunk), how long after its last backward the stage's STEP may begin; None: there are no
            STEPs.
    """
    instructions: list[Instruction] = []
    arcs: list[Arc] = []
    place: dict[tuple[int, str, int], int] = {}
    final = WEIGHT if splits_backward(schedule, num_stages) else BACKWARD
    for stage in range(num_stages):
        first = len(instructions)
        for action in schedule_actions(stage, num_stages, num_microbatches, schedule, interleave=interleave):
            if action.kind == STEP and exposed_s is None:
                continue
            place[action.chunk * num_stages + stage, action.kind, action.microbatch] = len(instructions)
            instructions.append(Instruction(stage, work_name(action.kind, action.chunk), action.microbatch))
        arcs += [Arc(i, i + 1) for i in range(first, len(instructions) - 1)]
    between_s = [transfer_s] * (num_stages * interleave) if isinstance(transfer_s, int | float) else transfer_s
    for (chunk, kind, microbatch), position in place.items():
        after = place.get((chunk + (1 if kind == FORWARD else -1), kind, microbatch))
        if kind in (FORWARD, BACKWARD) and after is not None:
            arcs.append(Arc(position, after, between_s[chunk if kind == FORWARD else chunk - 1]))
        if kind == final and microbatch == num_microbatches - 1 and exposed_s is not None:
            arcs.append(Arc(position, place[chunk % num_stages, STEP, -1], exposed_s[chunk]))
    return tuple(instructions), tuple(arcs)


def _rounded_up(seconds: float) -> str:
    """A time that one can type, not below `seconds`."""
    unit, size = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3)
    return f"{math.ceil(seconds / size * 1e4) / 1e4:.10g}{unit}"


def work_name(kind: str, chunk: int) -> str:
    """Kind of the instructions of a stage's chunk."""
    return f"{kind}.{chunk}" if chunk else kind


def _binds(relaxed: Relaxed, deadline_s: float) -> bool:
    return relaxed.step_s >= deadline_s * (1 - BINDING)


def _effective_j(problem: ClockProblem, stage: int, option: ClockOption) -> float:
    return problem.gpus_per_stage[stage] * (option.energy_j - problem.blocked_w_per_gpu * option.time_s)


def _useful(problem: ClockProblem, key: tuple[int, str]) -> tuple[ClockOption, ...]:
    """Options by ascending time, each with less effective energy than all faster ones."""
    kept: list[ClockOption] = []
    lowest_j = math.inf
    ranked = sorted((o.time_s, _effective_j(problem, key[0], o), o.clock_mhz, o) for o in set(problem.options[key]))
    for _, effective_j, _, option in ranked:
        if effective_j < lowest_j:
            kept.append(option)
            lowest_j = effective_j
    return tuple(kept)


def _network(
    problem: ClockProblem, useful: Mapping[tuple[int, str], tuple[ClockOption, ...]], straggler_s: float
) -> Network:
    count = len(problem.instructions)
    delays: dict[tuple[int, int], float] = {}
    for arc in problem.arcs:
        pair = (arc.before, arc.after)
        delays[pair] = max(delays.get(pair, 0.0), arc.delay_s)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(sorted(delays))
    if not nx.is_directed_acyclic_graph(graph):
        raise InputError("the arcs form a cycle")
    times = {key: tuple(o.time_s for o in options) for key, options in useful.items()}
    energies = {key: tuple(_effective_j(problem, key[0], o) for o in options) for key, options in useful.items()}
    keys = [(i.stage, i.kind) for i in problem.instructions]
    return Network(
        times_s=tuple(times[key] for key in keys),
        energies_j=tuple(energies[key] for key in keys),
        before=tuple(tuple((u, delays[u, v]) for u in sorted(graph.predecessors(v))) for v in range(count)),
        after=tuple(tuple((w, delays[v, w]) for w in sorted(graph.successors(v))) for v in range(count)),
        order=tuple(nx.lexicographical_topological_sort(graph)),
        waiting_w=problem.waiting_w,
        least_step_s=straggler_s,
    )
