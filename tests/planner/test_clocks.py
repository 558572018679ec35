"""Clocks of a plan's instructions: the problem is the plan's own schedule and prices."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.cost.hardware import load_cluster
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import InfeasibleError, InputError
from autopar.ir.plan import Plan
from autopar.ir.serialize import load_plan, save_plan
from autopar.ir.solution import Pins
from autopar.planner.clocks import clock_problem, highest_energy_j, plan_instruction_clocks
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.search.clocks import ClockPlanner

OPTIONS = {"layers": "4", "hidden": "2048", "heads": "16", "seq": "512", "vocab": "512", "batch": "8"}


def make_plan(gpu: str = "a100-sxm-80gb", **pins: int) -> Plan:
    found = Pins(dp=1, tp=1, pp=2, num_microbatches=4, recompute="none", **pins)
    return plan_model("gpt", OPTIONS, PlanRequest(2, gpu=gpu, pins=found, profile="none", clocks="max"))


@pytest.fixture(scope="module", params=[1, 2])
def plan(request: pytest.FixtureRequest) -> Plan:
    return make_plan(interleave=request.param)


def test_the_fastest_step_is_the_simulated_one(plan: Plan) -> None:
    """Without work that hides, the graph of instructions and the timeline are the same model."""
    graph = capture(load_source("gpt", OPTIONS)).graph
    tables = CostTables(graph, load_cluster("a100-sxm-80gb", 2))
    predicted = predict(tables, plan.decisions)
    problem = clock_problem(tables, plan.decisions)
    assert ClockPlanner(problem).fastest_s == pytest.approx(predicted.step_time_s.value, rel=1e-6)
    sends_j = predicted.energy_by_cause["dynamic"] + predicted.energy_by_cause["blocked"]
    assert highest_energy_j(problem, predicted.step_time_s.value) == pytest.approx(sends_j, rel=0.02)


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
    late = plan_instruction_clocks(plan, deadline_s=2 * alone.fastest_s, straggler_s=1.5 * alone.fastest_s)
    saved = [1 - found.chosen.energy_j / found.highest_j for found in (alone, late)]
    assert saved[0] < saved[1]


def test_what_cannot_be_planned_is_said() -> None:
    plan = make_plan()
    with pytest.raises(InfeasibleError, match="deadline"):
        plan_instruction_clocks(plan, deadline_s=plan.predicted.step_time_s.value / 10)
    with pytest.raises(InputError, match="cannot be locked"):
        plan_instruction_clocks(make_plan(gpu="cpu"))


def test_the_plan_may_come_from_a_file(tmp_path: Path) -> None:
    plan = make_plan()
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    assert plan_instruction_clocks(load_plan(path)) == plan_instruction_clocks(plan)
