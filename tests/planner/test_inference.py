"""Plans for inference: what they decide and predict, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.predict import plan_costs, transfers_s
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.inference import MODE_OPTION, is_inference, rates_of, require_training
from autopar.ir.pipeline import FORWARD_ONLY
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Limits, Objective, Pins
from autopar.planner.plan import CapturedGraph, Planned, capture_graph, make_plan
from autopar.planner.request import PlanRequest, choose_target
from autopar.report.text import plan_report
from autopar.search.brute import brute_force
from autopar.search.solve import search

OPTIONS = {
    MODE_OPTION: "inference", "layers": "4", "hidden": "256", "heads": "8", "kv_heads": "4", "ffn": "512",
    "vocab": "512", "seq": "64", "batch": "8", "cache": "200", "dtype": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def captured() -> CapturedGraph:
    return capture_graph("llama", OPTIONS, None)


def request_of(pins: Pins | None = None, num_gpus: int = 4, **others: object) -> PlanRequest:
    base = PlanRequest(num_gpus, gpu="cpu", use_all=True, with_baselines=False, profile="none", pins=pins or Pins())
    return replace(base, **others)  # type: ignore[arg-type]


def planned(captured: CapturedGraph, request: PlanRequest) -> Planned:
    return make_plan("llama", OPTIONS, request, captured=captured)


def test_a_plan_goes_forward_alone_and_says_so(captured: CapturedGraph) -> None:
    made = planned(captured, request_of(Pins(dp=1, tp=2, pp=2, num_microbatches=4)))
    plan = made.plan
    assert is_inference(plan)
    assert plan.decisions.schedule == FORWARD_ONLY
    for stage in plan.predicted.stages:
        assert stage.forward_s.value > 0
        assert stage.backward_s.value == stage.step_s.value == 0
        assert stage.memory_by_cause["gradients"] == stage.memory_by_cause["optimizer"] == 0
    assert parse_plan(dump_plan(plan)) == plan
    text = plan_report(plan, made.graph)
    assert "Latency" in text
    assert "tokens/s" in text
    assert "backward" not in text.split("Note")[0]
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(InputError, match="autopar clocks is for plans that train"):
        require_training(plan, "autopar clocks")


def test_the_step_is_a_pipeline_of_forwards(captured: CapturedGraph) -> None:
    """Longest path: each microbatch through each stage, one after another, with sends between stages."""
    plan = planned(captured, request_of(Pins(dp=1, tp=1, pp=4, num_microbatches=8))).plan
    tables = CostTables(captured.graph, choose_target(request_of()).cluster, pins=Pins(dp=1, tp=1))
    costs, _ = plan_costs(tables, plan.decisions)
    sends = transfers_s(tables, costs, plan.decisions)
    ends = [[0.0] * 9 for _ in range(5)]
    for k, cost in enumerate(costs):
        for m in range(8):
            arrived = ends[k - 1][m] + sends[k - 1] if k else 0.0
            ends[k][m] = max(arrived, ends[k][m - 1] if m else 0.0) + cost.forward_s
    assert plan.predicted.step_time_s.value == pytest.approx(ends[3][7], rel=1e-9)


def test_weights_and_cache_lie_in_parts(captured: CapturedGraph) -> None:
    """Under tensor parallelism each device has its heads of the cache, under data parallelism its samples."""
    graph = captured.graph
    cache = 4 * 2 * 8 * 4 * 200 * 32 * 4
    for pins in (Pins(dp=1, tp=4, pp=1, num_microbatches=1), Pins(dp=4, tp=1, pp=1, num_microbatches=1)):
        causes = planned(captured, request_of(pins)).plan.predicted.stages[0].memory_by_cause
        assert cache / 4 <= causes["activations"] <= 1.05 * cache / 4
    weights = sum(value.meta.num_bytes for value in graph.parameters)
    tensor = planned(captured, request_of(Pins(dp=1, tp=4, pp=1))).plan.predicted.stages[0].memory_by_cause
    assert weights / 4 <= tensor["parameters"] <= 1.1 * weights / 4


def test_a_longer_cache_costs_time_and_memory(captured: CapturedGraph) -> None:
    pins = Pins(dp=1, tp=2, pp=1, num_microbatches=1)
    short = planned(captured, request_of(pins, 2)).plan.predicted
    other = {**OPTIONS, "cache": "2000"}
    long = make_plan("llama", other, request_of(pins, 2)).plan.predicted
    assert long.step_time_s.value > short.step_time_s.value
    more = long.peak_memory_bytes[0].value - short.peak_memory_bytes[0].value
    assert more >= 1800 * 4 * 2 * 8 * 4 * 32 * 4 / 2


def test_rates_follow_from_the_figures(captured: CapturedGraph) -> None:
    plan = planned(captured, request_of(Pins(dp=1, tp=1, pp=4, num_microbatches=8))).plan
    rates, time_s = rates_of(plan), plan.predicted.step_time_s.value
    assert rates.samples_per_s.value == pytest.approx(8 / time_s)
    assert rates.tokens_per_s is not None
    assert rates.tokens_per_s.value == pytest.approx(8 / time_s)
    assert rates.j_per_sample.value == pytest.approx(plan.predicted.energy_j.value / 8)
    busiest = max(stage.forward_s.value for stage in plan.predicted.stages)
    assert rates.full_samples_per_s.value == pytest.approx(1 / busiest)
    assert rates.full_samples_per_s.value > rates.samples_per_s.value
    assert {rates.latency_s.label, rates.samples_per_s.label} == {"modelled"}


@pytest.mark.parametrize("kind", ["time", "energy"])
def test_the_search_finds_what_brute_force_finds(kind: str) -> None:
    """On a model that is small enough: one microbatch or more, stages, splits, under forward-only pipelines."""
    graph = capture_graph(
        "examples/mlp.py", {MODE_OPTION: "inference", "hidden": "512", "layers": "1", "batch": "4"}, 4
    )
    cluster = choose_target(request_of(num_gpus=2, clocks="max")).cluster
    pins = Pins(schedule=FORWARD_ONLY, recompute="none")
    tables = CostTables(graph.graph, cluster, pins=pins)  # type: ignore[arg-type]
    oracle = brute_force(tables, Objective(kind), pins=pins)
    found = search(tables, Objective(kind), pins=pins, gap_tolerance=1e-7)
    assert found.objective_value == pytest.approx(oracle.value, rel=2e-6)
    assert found.bound <= oracle.value * (1 + 1e-9)


def test_a_deadline_that_more_devices_keep_is_kept(captured: CapturedGraph) -> None:
    pins = Pins(tp=1, pp=1, num_microbatches=1)
    one = planned(captured, request_of(replace(pins, dp=1), 1)).plan.predicted
    limits = Limits(deadline_s=0.95 * one.step_time_s.value)
    plan = planned(captured, request_of(pins, use_all=False, objective=Objective("energy"), limits=limits)).plan
    assert plan.predicted.step_time_s.value <= 0.95 * one.step_time_s.value
    assert plan.decisions.num_gpus > 1


@pytest.mark.parametrize(
    ("pins", "words"),
    [(Pins(recompute="full"), "recompute=full"), (Pins(schedule="1f1b"), "schedule=1f1b"), (Pins(zero=3), "zero=3")],
)
def test_what_only_training_has_is_refused(captured: CapturedGraph, pins: Pins, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(captured, request_of(pins))
