"""The printed texts, against golden files; `pytest --update-golden` rewrites them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.ir.solution import Objective
from autopar.report.explain import explain_json, explain_report, time_parts
from autopar.report.text import WIDTH, plan_report
from tests.planner.plans import tiny_graph, tiny_plan

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def _rival() -> str:
    plan = tiny_plan()
    slower = replace(plan.predicted.step_time_s, value=0.012)
    rival = replace(plan, predicted=replace(plan.predicted, step_time_s=slower))
    return explain_report(plan, rival, "tp=2,pp=1")


def _defaulted() -> str:
    plan = tiny_plan()
    cluster = replace(plan.cluster, origin="default")
    notes = ("no GPU found here and none named with --gpu: planned for the default, h100-sxm-80gb", *plan.notes)
    return plan_report(replace(plan, cluster=cluster, notes=notes, objective=Objective("weighted", 2.0, 0.5)))


TEXTS: dict[str, Callable[[], str]] = {
    "plan.txt": lambda: plan_report(tiny_plan(), tiny_graph(), "plan.json"),
    "plan_default_gpu.txt": _defaulted,
    "explain.txt": lambda: explain_report(tiny_plan()),
    "explain_why_not.txt": _rival,
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_the_golden_one(name: str, update_golden: bool) -> None:
    text = TEXTS[name]() + "\n"
    if update_golden:
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", TEXTS)
def test_text_fits_into_80_columns(name: str) -> None:
    assert [line for line in TEXTS[name]().splitlines() if len(line) > WIDTH or line != line.rstrip()] == []


def test_time_parts_add_up_to_the_step() -> None:
    plan = tiny_plan()
    assert sum(time_parts(plan).values()) == pytest.approx(plan.predicted.step_time_s.value)


def test_explanation_in_numbers_holds_the_ratio_to_the_rival() -> None:
    plan = tiny_plan()
    assert explain_json(plan, plan)["rival"]["time_ratio"] == 1.0
