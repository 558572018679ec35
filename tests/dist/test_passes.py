"""Passes behind a switch (schemes (b) and (c) of "one weird trick") compute the serial model's numbers on processes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from autopar.cli.pins import parse_pins
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan
from autopar.ir.solution import Pins
from autopar.planner.passes import with_passes
from autopar.planner.plan import capture_graph, plan_model
from autopar.planner.request import PlanRequest
from autopar.runtime.launch import Job, launch_local
from tests.dist.models import ROOT
from tests.dist.test_decisions import TOLERANCE

pytestmark = pytest.mark.dist
OPTIONS = {"width": "8", "hidden": "32", "classes": "8", "image": "64", "batch": "16"}


@functools.cache
def alexnet(pins: str, num_gpus: int = 2, dropout: str = "0.3") -> Plan:
    request = PlanRequest(num_gpus, gpu="cpu", use_all=True, pins=parse_pins(pins).pins, with_baselines=False)
    return plan_model(str(ROOT / "examples" / "alexnet.py"), {**OPTIONS, "dropout": dropout}, request)


def on_ranks(worker: str, plans: list[Plan], num_processes: int = 2, **arguments: Any) -> list[Any]:
    job = Job(
        f"tests.dist.passes_worker:{worker}", {"plans": [dump_plan(p) for p in plans], **arguments}, num_processes
    )
    found: list[Any] = launch_local(job, timeout_s=300)[0]
    assert len(found) == len(plans)
    return found


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["loss_error"] <= TOLERANCE
        assert row["worst_gradient_error"] <= TOLERANCE, row["worst_parameter"]


def test_schemes_b_and_c_compute_the_gradients_of_the_whole_batch_or_those_of_an_update_in_each_pass() -> None:
    pins = (
        "pp=1,m=2,owt=b",
        "pp=1,m=1,owt=c,passes=4",
        "pp=1,m=2,owt=c,passes=2,fc_update=pass",
        "pp=1,m=1,owt=b,fc_update=pass",
    )
    plans = [alexnet(text) for text in pins]
    assert [(p.decisions.passes.order, p.decisions.passes.count) for p in plans if p.decisions.passes] == [
        ("turns", 2), ("shares", 4), ("shares", 2), ("turns", 2),
    ]  # fmt: skip
    rows = on_ranks("verify_all", plans)
    check(rows)
    assert [bool(row["updates"]) for row in rows] == [False, False, True, True]


def test_an_update_in_each_pass_is_that_of_loops_written_by_hand() -> None:
    """Rows of each pass are written out: by turns those of one rank of two, by shares a half of each rank's."""
    plans = [alexnet(f"pp=1,m=2,{text},fc_update=pass", dropout="0") for text in ("owt=b", "owt=c,passes=2")]
    turns, shares = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]]
    *right, wrong = on_ranks("by_hand", [*plans, plans[0]], rows=[turns, shares, turns[::-1]])
    for errors in right:
        assert len(errors) == 1 + 16
        assert max(errors.values()) <= TOLERANCE, errors
    assert max(wrong.values()) > 1e-6, "the order of updates matters"


@pytest.mark.slow
def test_passes_on_the_last_of_two_stages() -> None:
    plan = alexnet("pp=2,m=2,owt=a,schedule=1f1b,op:flatten.*=dim0", 4, dropout="0")
    first, last = plan.decisions.stages
    stages = (replace(first, stop=3), replace(last, start=3))
    graph = capture_graph(plan.model.source, plan.model.options, plan.model.batch_size).graph
    asked = (Pins(pass_order="shares", num_passes=2), Pins(pass_order="turns", pass_update="pass"))
    decisions = [with_passes(graph, replace(plan.decisions, stages=stages), pins) for pins in asked]
    check(on_ranks("verify_all", [replace(plan, decisions=own) for own in decisions], 4))
