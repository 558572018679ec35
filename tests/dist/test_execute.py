"""`verify_plan` and `run_plan` on plans of a small example, from source text to report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autopar.errors import PlanMismatchError, VerifyError
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.ir.solution import Pins
from autopar.planner.execute import run_plan, verify_plan
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
OPTIONS = {"inputs": "32", "hidden": "64", "layers": "2", "code": "16", "batch": "8"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two pipeline stages, two microbatches."""
    pins = Pins(dp=1, tp=1, pp=2, num_microbatches=2)
    request = PlanRequest(num_gpus=2, gpu="cpu", use_all=True, pins=pins)
    return plan_model(str(ROOT / "examples" / "mlp.py"), OPTIONS, request)


def test_a_plan_agrees_with_the_serial_and_the_eager_model(plan: Plan) -> None:
    report = verify_plan(plan)
    assert report.num_processes == 2
    assert report.num_parameters == 6
    assert max(report.loss_error, report.worst_gradient_error) <= 1e-10
    assert report.eager_error is not None
    assert report.eager_error < 1e-5
    assert "verified on 2 processes in float64" in str(report)


def test_a_disagreement_is_an_error_that_names_what_differs(plan: Plan) -> None:
    with pytest.raises(VerifyError, match=r"the loss differs by .* the gradient of"):
        verify_plan(plan, tolerance=-1.0)


def test_a_run_lowers_the_loss_and_tells_each_step(plan: Plan) -> None:
    told: list[str] = []
    report = run_plan(plan, RunSettings(steps=4), progress=told.append)
    assert len(report.losses) == 4
    assert report.losses[-1] < report.losses[0]
    assert report.step_time.label == "measured"
    assert [line.split(":")[0] for line in told[1:]] == [f"step {i}/4" for i in range(1, 5)]
    assert report.energy.total.value > 0
    assert report.energy.total.label in ("measured", "modelled")


def test_a_plan_for_another_model_is_refused(plan: Plan) -> None:
    other = replace(plan, model=replace(plan.model, options={**OPTIONS, "hidden": "32"}))
    with pytest.raises(PlanMismatchError, match="made for another model or batch"):
        verify_plan(other)
