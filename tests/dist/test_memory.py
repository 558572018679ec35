"""Predicted memory against every byte that two processes take from torch's allocator in real steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan
from autopar.ir.solution import Pins
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.runtime.launch import Job, launch_local

pytestmark = pytest.mark.dist
MODEL = str(Path(__file__).parents[2] / "benchmarks" / "plain_mlp.py")
OPTIONS = {"width": "256", "layers": "6", "batch": "4096"}
"""Activations outweigh parameters, as the gradients' buckets do not count yet."""
MOST_ABOVE = 0.15
PINS = {
    "data": Pins(dp=2, tp=1, pp=1, num_microbatches=1, zero=0),
    "data, four microbatches": Pins(dp=2, tp=1, pp=1, num_microbatches=4, zero=0),
    "zero1": Pins(dp=2, tp=1, pp=1, num_microbatches=1, zero=1),
    "recompute": Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0, recompute="full"),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    def plan(pins: Pins) -> Plan:
        request = PlanRequest(2, gpu="cpu", use_all=True, pins=pins, profile="none", with_baselines=False)
        return plan_model(MODEL, OPTIONS, request)

    return {name: plan(pins) for name, pins in PINS.items()}


@pytest.fixture(scope="module")
def measured(plans: dict[str, Plan]) -> dict[str, list[int]]:
    """Peak of each rank by plan."""
    job = Job("tests.dist.memory_worker:peaks", {"plans": [dump_plan(plan) for plan in plans.values()]}, 2)
    ranks = launch_local(job, timeout_s=300)
    return dict(zip(plans, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("name", PINS)
def test_memory_is_never_underrated_and_little_overrated(
    name: str, plans: dict[str, Plan], measured: dict[str, list[int]]
) -> None:
    predicted = plans[name].predicted.peak_memory_bytes[0].value
    for peak in measured[name]:
        assert peak > 4 * 2**20
        assert peak <= predicted <= (1 + MOST_ABOVE) * peak, f"{predicted / peak - 1:+.1%}"
