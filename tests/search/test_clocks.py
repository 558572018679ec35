"""Clocks of pipelines against enumeration of every choice, and two measured pipelines against their known bounds."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cli.quantities import parse_seconds
from autopar.errors import InfeasibleError, InputError
from autopar.search.clock_lp import lower_hull
from autopar.search.clocks import (
    Arc,
    ClockOption,
    ClockPlan,
    ClockPlanner,
    ClockProblem,
    Instruction,
    frontier,
    pipeline_graph,
    plan_clocks,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "lowtime"
FILES = ("A_gpt3_a100sxm_pp4_mb8.json", "C_gpt3_a100sxm_pp4_mb8_imbalanced.json")
LARGEST_GAP = 0.0035
"""Of the rounded plan over its bound, at any deadline of the measured pipelines."""


def makespan_s(problem: ClockProblem, times_s: tuple[float, ...]) -> float:
    """Longest path, by relaxation until nothing moves."""
    finish = list(times_s)
    for _ in times_s:
        for arc in problem.arcs:
            finish[arc.after] = max(finish[arc.after], finish[arc.before] + arc.delay_s + times_s[arc.after])
    return max(finish)


def energy_j(problem: ClockProblem, options: tuple[ClockOption, ...], least_step_s: float = 0.0) -> float:
    """Busy joules plus blocked power over the rest of the step, GPU by GPU, and what is drawn beside them."""
    step_s = max(least_step_s, makespan_s(problem, tuple(o.time_s for o in options)))
    busy_j = sum(
        problem.gpus_per_stage[i.stage] * o.energy_j for i, o in zip(problem.instructions, options, strict=True)
    )
    busy_s = sum(problem.gpus_per_stage[i.stage] * o.time_s for i, o in zip(problem.instructions, options, strict=True))
    waiting_j = problem.blocked_w_per_gpu * (sum(problem.gpus_per_stage) * step_s - busy_s)
    return busy_j + waiting_j + problem.shared_w * step_s


def brute_force(problem: ClockProblem, deadline_s: float, least_step_s: float = 0.0) -> float:
    """Least energy over every choice of options that meets the deadline."""
    lists = [problem.options[i.stage, i.kind] for i in problem.instructions]
    return min(
        (
            energy_j(problem, chosen, least_step_s)
            for chosen in itertools.product(*lists)
            if makespan_s(problem, tuple(o.time_s for o in chosen)) <= deadline_s
        ),
        default=math.inf,
    )


def check(problem: ClockProblem, plan: ClockPlan, least_step_s: float = 0.0) -> None:
    """Real options, deadline met exactly, energy and makespan as counted here."""
    for instruction, option in zip(problem.instructions, plan.options, strict=True):
        assert option in problem.options[instruction.stage, instruction.kind]
    span_s = makespan_s(problem, tuple(o.time_s for o in plan.options))
    assert span_s <= plan.deadline_s
    assert plan.makespan_s == pytest.approx(span_s, rel=1e-12)
    assert plan.energy_j == pytest.approx(energy_j(problem, plan.options, least_step_s), rel=1e-9)
    assert plan.bound_j <= plan.energy_j


@st.composite
def problems(draw: st.DrawFn) -> ClockProblem:
    """Two stages and two microbatches, two to three options each, not all of them useful."""
    microbatches = draw(st.integers(1, 2))
    instructions, arcs = pipeline_graph(2, microbatches, transfer_s=draw(st.sampled_from([0.0, 0.3])))
    options = {}
    for key in sorted({(i.stage, i.kind) for i in instructions}):
        count = draw(st.integers(1, 3 if microbatches == 1 else 2))
        options[key] = tuple(
            ClockOption(1000.0 + n, draw(st.floats(0.5, 3.0)), draw(st.floats(1.0, 20.0))) for n in range(count)
        )
    gpus = draw(st.sampled_from([(1, 1), (2, 3)]))
    blocked_w, shared_w = draw(st.sampled_from([0.0, 2.0])), draw(st.sampled_from([0.0, 5.0]))
    return ClockProblem(instructions, arcs, options, blocked_w, gpus, shared_w)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(1.0, 2.0))
def test_bound_optimum_and_plan_stand_in_order(problem: ClockProblem, factor: float) -> None:
    planner = ClockPlanner(problem)
    deadline_s = planner.fastest_s * factor
    plan = planner.plan(deadline_s)
    check(problem, plan)
    best_j = brute_force(problem, deadline_s)
    assert plan.bound_j <= best_j * (1 + 1e-9)
    assert best_j <= plan.energy_j * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(1.0, 2.0))
def test_behind_a_straggler_the_step_costs_its_whole_length(problem: ClockProblem, factor: float) -> None:
    straggler_s = ClockPlanner(problem).fastest_s * factor
    plan = plan_clocks(problem, straggler_s, straggler_s=straggler_s)
    check(problem, plan, straggler_s)
    best_j = brute_force(problem, straggler_s, straggler_s)
    assert plan.bound_j <= best_j * (1 + 1e-9)
    assert best_j <= plan.energy_j * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_a_later_deadline_never_costs_more(problem: ClockProblem) -> None:
    fastest_s = ClockPlanner(problem).fastest_s
    plans = frontier(problem, [fastest_s * (1 + 0.1 * n) for n in (9, 5, 1, 3, 0, 40, 80)])
    assert [p.deadline_s for p in plans] == sorted(p.deadline_s for p in plans)
    for plan in plans:
        check(problem, plan)
    for one, other in itertools.pairwise(plans):
        assert other.energy_j <= one.energy_j
        assert other.bound_j <= one.bound_j * (1 + 1e-9)


def chain(*lists: tuple[ClockOption, ...]) -> ClockProblem:
    instructions = tuple(Instruction(0, str(n), 0) for n in range(len(lists)))
    arcs = tuple(Arc(n, n + 1) for n in range(len(lists) - 1))
    return ClockProblem(instructions, arcs, {(0, str(n)): options for n, options in enumerate(lists)}, 1.0, (1,))


FAST, SLOW = ClockOption(1400.0, 0.1, 30.0), ClockOption(1000.0, 0.2, 20.0)


def test_without_slack_a_chain_runs_at_full_speed() -> None:
    problem = chain((FAST, SLOW), (FAST, SLOW), (FAST, SLOW))
    planner = ClockPlanner(problem)
    plan = planner.plan(planner.fastest_s)
    assert plan.clocks_mhz == (1400.0, 1400.0, 1400.0)
    assert plan.makespan_s == planner.fastest_s == plan.deadline_s
    assert plan.bound_j == pytest.approx(90.0)


def test_slack_off_the_critical_path_is_used_at_no_loss_of_time() -> None:
    options = {(0, "F"): (FAST, SLOW), (1, "F"): (ClockOption(1400.0, 0.2, 50.0),)}
    problem = ClockProblem((Instruction(0, "F", 0), Instruction(1, "F", 0)), (), options, 0.0, (1, 1))
    plan = plan_clocks(problem, 0.2)
    assert plan.clocks_mhz == (1000.0, 1400.0)
    assert plan.energy_j == plan.bound_j == 70.0


def test_waiting_costs_too() -> None:
    problem = replace(chain((FAST, SLOW)), blocked_w_per_gpu=0.0, gpus_per_stage=(1, 1))
    assert plan_clocks(problem, math.inf).clocks_mhz == (1000.0,)
    waits = replace(problem, blocked_w_per_gpu=120.0)  # 10 J saved, 0.1 s x 120 W spent by the other stage
    assert plan_clocks(waits, math.inf).clocks_mhz == (1400.0,)
    assert plan_clocks(waits, 0.5, straggler_s=0.5).clocks_mhz == (1000.0,)


def test_a_missed_deadline_names_what_it_needs() -> None:
    with pytest.raises(InfeasibleError, match="deadline") as caught:
        plan_clocks(chain((FAST, SLOW), (FAST,)), 0.19)
    assert (caught.value.need, caught.value.have) == ("200 ms at the fastest clocks", "190 ms")
    change = caught.value.remedies[0].change
    assert change.startswith("--deadline ")
    assert plan_clocks(chain((FAST, SLOW), (FAST,)), parse_seconds(change.split()[1])).energy_j > 0
    with pytest.raises(InfeasibleError):
        plan_clocks(chain((FAST,)), math.nan)


def test_malformed_pipelines_are_refused() -> None:
    problem = chain((FAST,), (FAST,))
    with pytest.raises(InputError, match="no options"):
        replace(problem, options={})
    with pytest.raises(InputError, match="outside"):
        replace(problem, arcs=(Arc(0, 2),))
    with pytest.raises(InputError, match="positive"):
        replace(problem, options={(0, "0"): (ClockOption(1.0, 0.0, 1.0),), (0, "1"): (FAST,)})
    with pytest.raises(InputError, match="cycle"):
        ClockPlanner(replace(problem, arcs=(Arc(0, 1), Arc(1, 0))))


def test_the_hull_leaves_out_what_lies_above() -> None:
    assert lower_hull([1, 2, 3, 4], [10, 9, 2, 1]) == [0, 2, 3]
    assert lower_hull([1], [5]) == [0]
    assert lower_hull([1, 2, 3], [3, 2, 1]) == [0, 2]


def test_the_same_problem_gives_the_same_plan() -> None:
    instructions, arcs = pipeline_graph(3, 4)
    curve = [(1400.0 - 50 * n, 0.1 * 1.04**n, 30.0 * 0.95**n) for n in range(9)]
    options = {(s, k): tuple(ClockOption(f, t * (1 + s / 9), e) for f, t, e in curve) for s in range(3) for k in "FB"}
    problem = ClockProblem(instructions, arcs, options, 80.0, (1, 1, 1))
    backwards = replace(problem, options={k: v[::-1] for k, v in reversed(options.items())}, arcs=arcs[::-1])
    deadline_s = ClockPlanner(problem).fastest_s * 1.03
    assert plan_clocks(problem, deadline_s) == plan_clocks(problem, deadline_s) == plan_clocks(backwards, deadline_s)


@pytest.mark.skipif(not DATA.is_dir(), reason="the measured pipelines are not beside the checkout")
@pytest.mark.parametrize("name", FILES)
def test_measured_pipelines_reach_their_bound_at_every_deadline(name: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from lowtime import read_case
    finally:
        sys.path.pop(0)
    case = read_case(DATA / name)
    planner = ClockPlanner(case.problem)
    assert len(case.deadlines) >= 8
    for row in case.deadlines:
        plan = planner.plan(row["deadline_s"], tries=20)
        assert plan.bound_j == pytest.approx(row["lp_lower_bound_J"], rel=1e-6)
        assert plan.energy_j <= plan.bound_j * (1 + LARGEST_GAP)
        assert plan.energy_j <= row["lp_round_J"]
        check(case.problem, plan)
        if row["lowtime_best_feasible_J"] is not None:
            assert plan.energy_j <= row["lowtime_best_feasible_J"]
