"""The frontier of plans: its ends are the plans of least time and of least energy, variants of pipelines included."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.ir.solution import Objective, Pins
from autopar.planner.frontier import trace_frontier
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest

OPTIONS = {"layers": "4", "hidden": "1024", "heads": "16", "seq": "512", "vocab": "512", "batch": "8"}


def test_the_ends_are_the_plans_of_one_objective() -> None:
    pins = Pins(dp=1, tp=1, pp=2, num_microbatches=4)
    request = PlanRequest(2, gpu="a100-sxm-80gb", pins=pins, profile="none", with_baselines=False)
    plans = trace_frontier("gpt", OPTIONS, request, 4).plans
    fastest, thriftiest = (
        plan_model("gpt", OPTIONS, replace(request, objective=Objective(kind))) for kind in ("time", "energy")
    )
    assert fastest.decisions.interleave > 1, "a variant that the search itself does not know"
    assert plans[0].predicted.step_time_s.value == pytest.approx(fastest.predicted.step_time_s.value, rel=1e-9)
    assert plans[-1].predicted.energy_j.value == pytest.approx(thriftiest.predicted.energy_j.value, rel=1e-9)
