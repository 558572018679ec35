"""Predicted memory against every byte that two processes take from torch's allocator in real steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pytest

from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan
from autopar.ir.software import PRECISION_OPTION
from autopar.ir.solution import Pins
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.planner.software import chosen_software
from autopar.runtime.launch import Job, launch_local

pytestmark = pytest.mark.dist
MODEL = str(Path(__file__).parents[2] / "benchmarks" / "plain_mlp.py")
LONG = {"width": "256", "layers": "6", "batch": "4096"}
WIDE = {"width": "1024", "layers": "6", "batch": "512"}
"""Activations outweigh parameters, and the other way round, where the buckets of gradients count."""
MOST_ABOVE = 0.15
ABOVE = {"activations on disk": 0.22}
"""Where little is left on the device, the batch counts, which lay there before."""
CASES = {
    "data": (LONG, Pins(dp=2, tp=1, pp=1, num_microbatches=1, zero=0)),
    "data, two microbatches": (LONG, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0)),
    "data, four microbatches": (LONG, Pins(dp=2, tp=1, pp=1, num_microbatches=4, zero=0)),
    "zero1": (LONG, Pins(dp=2, tp=1, pp=1, num_microbatches=1, zero=1)),
    "recompute": (LONG, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0, recompute="full")),
    "buckets": (WIDE, Pins(dp=2, tp=1, pp=1, num_microbatches=1, zero=0)),
    "buckets, four microbatches": (WIDE, Pins(dp=2, tp=1, pp=1, num_microbatches=4, zero=0)),
    "buckets, zero1": (WIDE, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=1)),
    "buckets, zero2, four microbatches": (WIDE, Pins(dp=2, tp=1, pp=1, num_microbatches=4, zero=2)),
    "bf16": ({**WIDE, PRECISION_OPTION: "bf16"}, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0)),
    "bf16, zero1": ({**WIDE, PRECISION_OPTION: "bf16"}, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=1)),
    "zero-bubble": (LONG, Pins(dp=1, tp=1, pp=2, num_microbatches=4, schedule="zero-bubble")),
    "states on disk": (WIDE, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0, offload_optimizer="disk")),
    "activations on disk": (LONG, Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0, offload_activations="disk")),
    "bf16, states on disk": (
        {**WIDE, PRECISION_OPTION: "bf16"},
        Pins(dp=2, tp=1, pp=1, num_microbatches=2, zero=0, offload_optimizer="disk"),
    ),
    "first stage of eight microbatches": (WIDE, Pins(dp=1, tp=1, pp=2, num_microbatches=8)),
}
FOUR_STAGES = {
    f"{name}, {count} microbatches, {schedule}": (
        {**options, "layers": "8"},
        Pins(dp=1, tp=1, pp=4, num_microbatches=count, schedule=schedule),
    )
    for (name, options), count, schedule in product((("long", LONG), ("wide", WIDE)), (4, 8), ("1f1b", "gpipe"))
}


def planned(options: dict[str, str], pins: Pins, num_processes: int) -> Plan:
    software = chosen_software("autopar", {}, options.get(PRECISION_OPTION))
    request = PlanRequest(
        num_processes, gpu="cpu", use_all=True, pins=pins, profile="none", with_baselines=False, software=software
    )
    return plan_model(MODEL, options, request)


def peaks_of(plans: Mapping[str, Plan], num_processes: int) -> dict[str, list[int]]:
    """Peak of each rank by plan."""
    job = Job("tests.dist.memory_worker:peaks", {"plans": [dump_plan(plan) for plan in plans.values()]}, num_processes)
    ranks = launch_local(job, timeout_s=300)
    return dict(zip(plans, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: planned(*case, 2) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def measured(plans: dict[str, Plan]) -> dict[str, list[int]]:
    return peaks_of(plans, 2)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_never_underrated_and_little_overrated(
    name: str, plans: dict[str, Plan], measured: dict[str, list[int]]
) -> None:
    predicted = plans[name].predicted.peak_memory_bytes
    for rank, peak in enumerate(measured[name]):
        figure = predicted[rank if len(predicted) > 1 else 0].value
        assert peak > 4 * 2**20
        assert (1 - 1e-6) * peak <= figure <= (1 + ABOVE.get(name, MOST_ABOVE)) * peak, f"{figure / peak - 1:+.1%}"


def test_no_rank_of_four_stages_is_underrated() -> None:
    """Ends of a pipeline are overrated more: the batch counts, which lay there before."""
    plans = {name: planned(*case, 4) for name, case in FOUR_STAGES.items()}
    for name, peaks in peaks_of(plans, 4).items():
        for rank, (peak, figure) in enumerate(zip(peaks, plans[name].predicted.peak_memory_bytes, strict=True)):
            most = {0: 0.36, 3: 0.18}.get(rank, MOST_ABOVE)
            assert peak <= figure.value <= (1 + most) * peak, f"{name} rank {rank}: {figure.value / peak - 1:+.1%}"


def test_what_lies_on_disk_is_gone_from_memory(plans: dict[str, Plan], measured: dict[str, list[int]]) -> None:
    """Nearly all of it: a shard of the states is there during the update, or the worst moment is another."""
    for name, plain in (("bf16, states on disk", "bf16"), ("activations on disk", "data, two microbatches")):
        gone = sum((plans[name].predicted.stages[0].offloaded or {}).values())
        assert max(measured[name]) < max(measured[plain]) - 0.4 * gone
