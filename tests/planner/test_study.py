"""Prices of a study against the price of the same thing as a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.cost.collective import collective_cost
from autopar.cost.hardware import Cluster
from autopar.ir.mesh import Group
from autopar.ir.solution import Pins
from autopar.ir.sync import parse_policy
from autopar.planner.plan import capture_graph, make_plan
from autopar.planner.request import PlanRequest, choose_target
from autopar.planner.study import exchanged_of, study_model

MODEL = """
import torch

def build_model(*, width: int = 512):
    return torch.nn.Sequential(torch.nn.Linear(256, width), torch.nn.GELU(), torch.nn.Linear(width, 256))

def example_batch(*, batch: int = 4096):
    return torch.zeros(batch, 256), torch.zeros(batch, dtype=torch.long)

def loss(output, batch):
    return torch.nn.functional.cross_entropy(output, batch[1])
"""


@pytest.mark.parametrize("gpu", ["cpu", "a100-sxm-80gb"])
def test_all_reduce_costs_what_a_data_parallel_plan_does(gpu: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    source = str(tmp_path / "model.py")
    request = PlanRequest(num_gpus=4, gpu=gpu, profile="none")
    study = study_model(source, {}, request, [parse_policy("all-reduce")], [1, 4])
    pins = Pins(dp=4, tp=1, pp=1, zero=0, num_microbatches=1, recompute="none")
    asked = PlanRequest(
        num_gpus=4, gpu=gpu, profile="none", pins=pins, use_all=True, with_baselines=False, clocks="max"
    )
    captured = capture_graph(source, {}, None)
    plan = make_plan(source, {}, asked, captured=captured).plan
    price = study.cases[1].price
    assert price is not None
    cluster = choose_target(asked).cluster
    assert isinstance(cluster, Cluster)
    # AdamW moves more bytes than SGD; a plan pays each bucket's share of one latency, and another to sum the loss.
    latency_s = collective_cost(cluster, "all_reduce", Group(4, 1)).latency_s
    what = exchanged_of(captured.graph)
    update_s = 4 * what.num_bytes / (cluster.spec.memory_bytes_per_s * cluster.spec.memory_efficiency)
    found_s, planned_s = price.step_time_s.value, plan.predicted.step_time_s.value
    assert planned_s - update_s == pytest.approx(found_s, abs=latency_s)
    assert price.energy_j.value == pytest.approx(plan.predicted.energy_j.value, rel=0.1)
    assert price.sent_bytes == what.num_bytes == 4 * sum(v.meta.numel for v in captured.graph.parameters)
