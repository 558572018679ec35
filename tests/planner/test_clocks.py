"""Clocks of a plan's instructions: the problem is the plan's own schedule and prices."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.cost.collective import send_cost
from autopar.cost.hardware import load_cluster
from autopar.cost.predict import plan_costs, predict
from autopar.cost.table import CostTables
from autopar.errors import InfeasibleError, InputError
from autopar.ir.graph import OpGraph
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.serialize import load_plan, save_plan
from autopar.ir.solution import Decisions, Pins
from autopar.ir.timeline import StageTimes, simulate
from autopar.planner.clocks import ClockPass, Straggler, clock_problem, highest_energy_j, plan_instruction_clocks
from autopar.planner.plan import plan_graph, plan_model
from autopar.planner.request import PlanRequest, choose_target
from autopar.report.clocks import clocks_json, clocks_report
from autopar.search.clocks import ClockPlanner

OPTIONS = {"layers": "4", "hidden": "2048", "heads": "16", "seq": "512", "vocab": "512", "batch": "8"}


@functools.cache
def captured() -> OpGraph:
    return capture(load_source("gpt", OPTIONS)).graph


def make_plan(gpu: str = "a100-sxm-80gb", **pins: int) -> Plan:
    found = Pins(dp=1, tp=1, pp=2, num_microbatches=4, recompute="none", schedule="1f1b", **pins)
    return plan_model("gpt", OPTIONS, PlanRequest(2, gpu=gpu, pins=found, profile="none", clocks="max"))


@pytest.fixture(scope="module", params=[1, 2])
def plan(request: pytest.FixtureRequest) -> Plan:
    return make_plan(interleave=request.param)


def test_the_fastest_step_is_the_simulated_one(plan: Plan) -> None:
    """Without work that hides, the graph of instructions and the timeline are the same model."""
    tables = CostTables(captured(), load_cluster("a100-sxm-80gb", 2))
    predicted = predict(tables, plan.decisions)
    problem = clock_problem(tables, plan.decisions)
    assert ClockPlanner(problem).fastest_s == pytest.approx(predicted.step_time_s.value, rel=1e-6)
    assert highest_energy_j(problem, predicted.step_time_s.value) == pytest.approx(predicted.energy_j.value, rel=0.02)


@pytest.mark.parametrize(
    "pins",
    [
        {"pp": 2},
        {"pp": 2, "dp": 2},
        {"pp": 2, "dp": 2, "interleave": 2},
        {"pp": 1, "dp": 2},
        {"pp": 2, "schedule": "zero-bubble"},
        {"pp": 2, "dp": 2, "interleave": 2, "schedule": "zero-bubble"},
    ],
)
@pytest.mark.parametrize("indices", [(0, 0), (5, 2)])
def test_at_the_plans_own_clocks_the_problem_costs_what_the_prediction_says(
    pins: dict[str, int], indices: tuple[int, int]
) -> None:
    """Hidden gradient synchronisation, chunks and a clock per stage included; sends stand outside."""
    tables, decisions = clocked_decisions(pins, indices)
    predicted = predict(tables, decisions)
    found = ClockPass.of(tables, decisions)
    assert ClockPlanner(found.own_problem).fastest_s == pytest.approx(predicted.step_time_s.value, rel=1e-6)
    costs, _ = plan_costs(tables, decisions)
    sent = 2 * decisions.mesh.num_devices * decisions.num_microbatches * sum(cost.received_bytes for cost in costs)
    link = send_cost(tables.cluster, same_node=2 * decisions.mesh.num_devices <= tables.cluster.gpus_per_node)
    assert found.own_j + sent * link.j_per_byte == pytest.approx(predicted.energy_j.value, rel=1e-6)
    assert found.sends_j == pytest.approx(sent * link.j_per_byte, abs=1e-6 * found.own_j)
    own = found.own_figures()
    assert own == pytest.approx((predicted.step_time_s.value, predicted.energy_j.value), rel=1e-6)
    step_s, joules = found.choose(0.0)
    assert step_s <= own[0] * (1 + 1e-6)
    assert joules <= own[1] * (1 + 1e-6)
    later_s, later_j = found.choose(1.5 * own[0])
    assert later_j <= joules * (1 + 1e-3), "more time never costs energy, hosts included"
    assert later_s <= 1.5 * own[0] * (1 + 1e-6)


def clocked_decisions(pins: dict[str, int], indices: tuple[int, int]) -> tuple[CostTables, Decisions]:
    """Prices, and a plan whose stages are locked at those clocks by turns."""
    ranks = pins["pp"] * pins.get("dp", 1)
    wanted = Pins(**{"dp": 1, "tp": 1, "num_microbatches": 4, "recompute": "none"} | pins)  # type: ignore[arg-type]
    request = PlanRequest(ranks, gpu="a100-sxm-80gb", pins=wanted, profile="none", with_baselines=False)
    reference = ModelReference("gpt", OPTIONS, "", 0)
    decisions = plan_graph(captured(), reference, request, choose_target(request)).decisions
    tables = CostTables(captured(), load_cluster("a100-sxm-80gb", ranks))
    stages = tuple(
        replace(stage, clock_hz=tables.clocks_hz[indices[k % decisions.num_ranks]] if indices[0] else 0.0)
        for k, stage in enumerate(decisions.stages)
    )
    return tables, replace(decisions, stages=stages)


def test_lower_clocks_save_energy_within_the_deadline(plan: Plan) -> None:
    found = plan_instruction_clocks(plan)
    assert found.chosen.bound_j <= found.chosen.energy_j < found.highest_j
    assert found.chosen.makespan_s <= found.chosen.deadline_s
    energies = [point.energy_j for point in found.points]
    assert energies == sorted(energies, reverse=True)
    assert sum(len(own.clocks_mhz) for own in found.stages) == found.num_instructions - 2


def test_waiting_for_a_straggler_leaves_room_for_lower_clocks() -> None:
    plan = make_plan()
    alone = plan_instruction_clocks(plan)
    late = plan_instruction_clocks(plan, straggler=Straggler(step_s=1.5 * alone.own_s))
    assert plan_instruction_clocks(plan, straggler=Straggler(ratio=1.5)) == replace(late, slow_ratio=1.5)
    assert late.chosen.makespan_s <= late.straggler_s == pytest.approx(1.5 * alone.own_s)
    saved = [1 - found.chosen.energy_j / found.highest_j for found in (alone, late)]
    assert saved[0] < saved[1]
    assert late.highest_j > alone.highest_j
    assert "whatever these clocks are" in clocks_report(late)


def test_the_others_go_at_the_pace_of_a_slow_rank() -> None:
    plan = make_plan(interleave=1)
    predicted = plan.predicted
    times = [StageTimes(s.forward_s.value, s.backward_s.value, s.step_s.value) for s in predicted.stages]
    slow = StageTimes(1.3 * times[1].forward_s, 1.3 * times[1].backward_s, 1.3 * times[1].step_s)
    expected_s = simulate([times[0], slow], [0.0], 4, "1f1b").makespan_s
    alone = plan_instruction_clocks(plan)
    found = plan_instruction_clocks(plan, straggler=Straggler(ratio=1.3, rank=1))
    assert found.fastest_s == pytest.approx(expected_s, rel=0.01)
    assert found.fastest_s > alone.fastest_s
    clocks = {stage: {c for own in found.stages if own.stage == stage for c in own.clocks_mhz} for stage in (0, 1)}
    assert clocks[1] == {1410.0}
    lowest = min(c for own in alone.stages if own.stage == 0 for c in own.clocks_mhz)
    assert min(clocks[0]) <= lowest
    assert found.chosen.makespan_s <= found.fastest_s * (1 + 1e-6)
    assert found.chosen.energy_j < found.highest_j
    assert "pipeline rank 1 takes 1.3 times" in " ".join(clocks_report(found).split())
    assert clocks_json(found)["straggler"] == {"step_s": None, "rank": 1, "ratio": 1.3}


def test_what_cannot_be_planned_is_said() -> None:
    plan = make_plan()
    with pytest.raises(InfeasibleError, match="deadline"):
        plan_instruction_clocks(plan, deadline_s=plan.predicted.step_time_s.value / 10)
    with pytest.raises(InputError, match="cannot be locked"):
        plan_instruction_clocks(make_plan(gpu="cpu"))
    with pytest.raises(InputError, match="ranks 0 to 1"):
        plan_instruction_clocks(plan, straggler=Straggler(ratio=1.2, rank=2))
    with pytest.raises(InputError, match="at least as long"):
        Straggler(ratio=0.9)


def test_the_plan_may_come_from_a_file(tmp_path: Path) -> None:
    plan = make_plan()
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    assert plan_instruction_clocks(load_plan(path)) == plan_instruction_clocks(plan)
