"""Savings: the way from the plan of least time, each step of it what planning finds by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from autopar.cost.hardware import load_cluster
from autopar.errors import InputError, PlanMismatchError
from autopar.ir.plan import Plan
from autopar.ir.savings import Savings, SavingStep
from autopar.ir.serialize import parse_plan
from autopar.ir.solution import Limits, Objective, Pins
from autopar.planner.recall import Command, finished_plan
from autopar.planner.request import PlanRequest
from autopar.planner.savings import split_savings
from autopar.report.explain_savings import savings_json, savings_report

OPTIONS = {"layers": "2", "hidden": "2048", "heads": "16", "seq": "1024", "vocab": "512", "batch": "16"}
PINS = Pins(tp=1, num_microbatches=4, recompute="none")
REQUEST = PlanRequest(2, gpu="a100-sxm-80gb", pins=PINS, profile="none", objective=Objective("energy"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all tests: most of them meet the same plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_cache(cache: None) -> None:
    """In place of the one that every test has of its own."""


def made(request: PlanRequest) -> Plan:
    return parse_plan(finished_plan(Command("gpt", OPTIONS, request)).plan_text)


def energy_j(step: SavingStep) -> float:
    assert step.energy_j is not None
    return step.energy_j.value


def time_s(step: SavingStep) -> float:
    assert step.step_time_s is not None
    return step.step_time_s.value


@pytest.fixture(scope="module")
def plan(cache: None) -> Plan:
    return made(REQUEST)


@pytest.fixture(scope="module")
def found(plan: Plan) -> Savings:
    return split_savings(plan, PINS)


def test_steps_add_up_from_the_fastest_plan_to_the_plan(plan: Plan, found: Savings) -> None:
    assert energy_j(found.plan) == plan.predicted.energy_j.value
    assert sum(step.saved_j for step in found.steps) == pytest.approx(energy_j(found.fastest) - energy_j(found.plan))
    assert found.saved_j > 0
    assert all(step.saved_j >= 0 for step in found.steps)
    assert found.remarks == ()


def test_each_step_is_what_planning_finds(found: Savings) -> None:
    fastest = made(replace(REQUEST, objective=Objective("time")))
    assert time_s(found.fastest) == fastest.predicted.step_time_s.value
    highest = replace(REQUEST, clocks="max")
    same = made(replace(highest, num_gpus=fastest.decisions.num_gpus, use_all=True))
    searched = [same, made(highest)]
    for step, plan in zip(found.steps, searched, strict=False):
        assert energy_j(step) <= plan.predicted.energy_j.value
        assert energy_j(step) in [p.predicted.energy_j.value for p in (fastest, *searched)]
    assert found.steps[0].num_gpus == fastest.decisions.num_gpus


def test_clocks_of_instructions_only_save_and_keep_the_time(plan: Plan, found: Savings) -> None:
    in_time, later = found.alone
    assert time_s(in_time) <= time_s(found.fastest) * (1 + 1e-6)
    assert time_s(later) <= max(time_s(found.plan), time_s(found.fastest)) * (1 + 1e-6)
    assert energy_j(later) <= energy_j(in_time) * (1 + 1e-9) <= energy_j(found.fastest) * (1 + 2e-9)
    assert found.beyond is not None
    assert energy_j(found.beyond) <= energy_j(found.plan) * (1 + 1e-9)
    assert time_s(found.beyond) <= time_s(found.plan) * (1 + 1e-6)
    dynamic_j = plan.predicted.energy_by_cause["dynamic"]
    assert energy_j(found.plan) - energy_j(found.beyond) < dynamic_j


def test_limits_hold_on_the_whole_way(plan: Plan) -> None:
    deadline_s = plan.predicted.step_time_s.value * 1.1
    limited = made(replace(REQUEST, limits=Limits(deadline_s=deadline_s)))
    found = split_savings(limited, PINS)
    for step in (found.fastest, *found.steps):
        assert step.reason or time_s(step) <= deadline_s * (1 + 1e-9)


def test_where_clocks_are_left_alone_nothing_is_saved_by_them(plan: Plan) -> None:
    highest = made(replace(REQUEST, clocks="max"))
    found = split_savings(highest, PINS)
    assert found.steps[-1].saved_j == pytest.approx(0.0, abs=1e-3 * energy_j(found.plan))
    assert energy_j(found.plan) >= plan.predicted.energy_j.value


def test_a_plan_that_its_pins_made_dearer_is_named(plan: Plan) -> None:
    pinned = made(replace(REQUEST, pins=replace(PINS, pp=2), clocks="max", use_all=False))
    found = split_savings(pinned, PINS)
    assert ("--pin" in " ".join(found.remarks)) == (found.steps[-1].saved_j < -1e-3 * energy_j(found.plan))


def test_what_cannot_be_split_is_said(plan: Plan) -> None:
    with pytest.raises(InputError, match="least time"):
        split_savings(replace(plan, objective=Objective("time")))
    other = replace(plan.cluster, input_hash=load_cluster("k20", 1).input_hash)
    with pytest.raises(PlanMismatchError, match="other numbers"):
        split_savings(replace(plan, cluster=other))
    with pytest.raises(PlanMismatchError, match="has changed"):
        split_savings(replace(plan, model=replace(plan.model, graph_hash="0" * 64)), PINS)


def test_the_report_fits_and_names_every_step(found: Savings) -> None:
    lines = savings_report(found)
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for step in (found.fastest, *found.steps, *found.alone):
        assert step.cause in text
    content = savings_json(found)
    assert content["saved_j"] == found.saved_j
    assert {row["energy_j"]["label"] for row in content["steps"]} == {"modelled"}
