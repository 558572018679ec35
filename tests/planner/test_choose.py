"""The plan chosen: never dearer than a baseline under the same simulation, and within every limit when simulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autopar.cost.table import CostTables
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.solution import Limits, Objective, Pins, Solution
from autopar.ir.verify import broken_limits
from autopar.planner import choose
from autopar.planner.plan import capture_graph, make_plan, plan_graph, plan_model
from autopar.planner.request import PlanRequest, choose_target
from autopar.search.solve import search
from tests.toy_graphs import attention_graph, mlp_graph, residual_graph

GRAPHS = {"mlp": mlp_graph(), "residual": residual_graph(layers=4), "attention": attention_graph()}
REQUEST = PlanRequest(4, gpu="a100-sxm-80gb", gpus_per_node=2)


def plan_toy(name: str, request: PlanRequest) -> Plan:
    return plan_graph(GRAPHS[name], ModelReference(name, {}, "", 0), request, choose_target(request))


def assert_not_dearer(plan: Plan) -> None:
    assert len(plan.baselines) == 3
    objective, predicted = plan.objective, plan.predicted
    value = objective.value(predicted.step_time_s.value, predicted.energy_j.value, plan.decisions.num_gpus)
    fitting = [b for b in plan.baselines if not b.reason and b.step_time_s is not None and b.energy_j is not None]
    assert fitting
    for baseline in fitting:
        assert baseline.step_time_s is not None
        assert baseline.energy_j is not None
        other = objective.value(baseline.step_time_s.value, baseline.energy_j.value, baseline.num_gpus)
        assert value <= other * (1 + 1e-9)


@pytest.mark.parametrize("name", sorted(GRAPHS))
@pytest.mark.parametrize("kind", ["time", "energy", "edp"])
def test_no_toy_plan_is_dearer_than_a_baseline(name: str, kind: str) -> None:
    assert_not_dearer(plan_toy(name, replace(REQUEST, objective=Objective(kind))))


@pytest.mark.parametrize("kind", ["time", "energy", "edp"])
@pytest.mark.parametrize("model", ["examples/gpt2.py", "examples/alexnet.py"])
def test_no_example_s_plan_is_dearer_than_a_baseline(model: str, kind: str) -> None:
    options = {"layers": "2", "hidden": "64", "heads": "4", "seq": "32"} if "gpt2" in model else {}
    assert_not_dearer(plan_model(model, options, replace(REQUEST, objective=Objective(kind), batch_size=16)))


def test_plans_keep_their_limits_when_simulated() -> None:
    free = plan_toy("residual", REQUEST).predicted
    dynamic_w = free.energy_by_cause["dynamic"] / free.step_time_s.value
    cap_w = free.average_power_w.value - 0.3 * dynamic_w
    limits = (
        Limits(deadline_s=1.05 * free.step_time_s.value),
        Limits(average_power_w=cap_w),
        Limits(peak_power_w=1.01 * free.peak_power_w.value),
        Limits(deadline_s=3 * free.step_time_s.value, average_power_w=cap_w),
    )
    for limit in limits:
        plan = plan_toy("residual", replace(REQUEST, objective=Objective("energy"), limits=limit))
        assert plan.limits == limit
        assert broken_limits(plan.predicted, limit) == ()


SMALL_GPT2 = {"layers": "12", "hidden": "1024", "heads": "16", "seq": "256"}


@pytest.mark.parametrize("kind", ["energy", "edp"])
def test_the_plan_of_least_time_is_no_better_at_any_clock(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search for the objective misses it, as it misses variants."""

    def blind(source: Any, objective: Objective, *, pins: Pins, **others: Any) -> Solution:
        is_time = objective.kind == "time"
        return search(source, objective, pins=pins if is_time else replace(pins, tp=4), **others)

    monkeypatch.setattr(choose, "search", blind)
    request = PlanRequest(16, gpu="a100-sxm-80gb", batch_size=64, with_baselines=False)
    source = "examples/gpt2.py"
    captured = capture_graph(source, SMALL_GPT2, 64)
    fast = make_plan(source, SMALL_GPT2, replace(request, objective=Objective("time")), captured=captured).plan
    found = make_plan(source, SMALL_GPT2, replace(request, objective=Objective(kind)), captured=captured).plan
    tables = CostTables(captured.graph, choose_target(request).cluster, software=request.software)
    least = choose.value_of(found.objective, found.decisions, found.predicted)
    assert len(tables.clocks_hz) > 3
    for hz in (0.0, *tables.clocks_hz[1:]):
        stages = tuple(replace(stage, clock_hz=hz) for stage in fast.decisions.stages)
        slower, prediction = choose.simulated(tables, replace(fast.decisions, stages=stages), Limits())
        assert least <= choose.value_of(found.objective, slower, prediction) * (1 + 1e-9)
