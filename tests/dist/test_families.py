"""The built-in families under every pin of their layout compute the serial step, in float64, on real processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autopar.ir.serialize import dump_plan
from autopar.ir.solution import Objective, Pins
from autopar.planner.execute import FLOAT64_TOLERANCE
from autopar.planner.plan import Planned, make_plan
from autopar.planner.request import PlanRequest
from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist
TINY = {"layers": "3", "hidden": "32", "heads": "4", "vocab": "64", "seq": "16", "batch": "4", "dtype": "fp32"}
MIXTRAL = {"layers": "2", "hidden": "32", "heads": "4", "kv_heads": "4", "ffn": "64", "experts": "4", "seq": "16"}


@dataclass(frozen=True)
class Case:
    """A model under pins, and labels that the plan must use on the axis that it splits."""

    source: str
    pins: Pins
    labels: frozenset[str]
    options: dict[str, str] = field(default_factory=dict)

    def plan(self, num_gpus: int) -> Planned:
        base = TINY if self.source in ("gpt", "llama") else {**MIXTRAL, "vocab": "64", "batch": "4", "dtype": "float32"}
        request = PlanRequest(
            num_gpus=num_gpus,
            gpu="h100-sxm-80gb",
            objective=Objective("time"),
            pins=self.pins,
            use_all=True,
            with_baselines=False,
        )
        return make_plan(self.source, {**base, **self.options}, request)


def tensor(sequence: bool, **others: int) -> Pins:
    return Pins(**{"dp": 1, "tp": 2, "pp": 1, **others}, sequence=sequence)


TENSOR = frozenset({"columns", "contract", "rows"})
MIXTRAL_SOURCE = str(Path(__file__).parents[2] / "examples" / "mixtral.py")
UNFUSED = {"attention": "unfused"}
ON_TWO = (
    Case("gpt", tensor(False), TENSOR, UNFUSED),
    Case("gpt", tensor(True), TENSOR, UNFUSED),
    Case("gpt", tensor(True), TENSOR, {**UNFUSED, "positions": "alibi", "bias": "false", "qkv": "separate"}),
    Case("gpt", tensor(False), TENSOR, {"kv_heads": "2", "tied": "false"}),
    Case("llama", tensor(True), TENSOR, {"kv_heads": "2"}),
    Case("llama", tensor(False), TENSOR, {"kv_heads": "2", **UNFUSED}),
    Case("llama", Pins(dp=1, tp=1, pp=1, cp=2, zero=3), frozenset({"context", "dim1", "tokens1"})),
    Case("gpt", Pins(dp=1, tp=1, pp=1, cp=2), frozenset({"dim1", "tokens1"}), UNFUSED),
    Case(MIXTRAL_SOURCE, Pins(dp=2, tp=1, pp=1, ep=2), frozenset({"dim0"})),
)
ON_FOUR = (
    Case("llama", tensor(True, cp=2, zero=1), TENSOR | {"context", "classes"}, {"kv_heads": "2"}),
    Case("gpt", tensor(False, dp=2, num_microbatches=2), TENSOR, UNFUSED),
)


@pytest.mark.parametrize(("num_gpus", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_pinned_layouts_compute_the_serial_step(num_gpus: int, cases: tuple[Case, ...]) -> None:
    plans = [case.plan(num_gpus).plan for case in cases]
    for case, plan in zip(cases, plans, strict=True):
        used = {axis.label for strategy in plan.decisions.ops.values() for axis in strategy}
        assert case.labels <= used, (case, used)
        assert plan.decisions.num_gpus == num_gpus
    arguments = {"plans": [dump_plan(p) for p in plans], "dtype": "float64", "tolerance": FLOAT64_TOLERANCE}
    found = run_on(num_gpus, "benchmarks.verify_matrix:worker", arguments)
    for case, report in zip(cases, found[0], strict=True):
        assert max(report["loss_error"], report["worst_gradient_error"]) <= FLOAT64_TOLERANCE, case


def test_experts_are_spread_over_their_axis() -> None:
    decisions = ON_TWO[-1].plan(2).plan.decisions
    assert decisions.mesh.sizes == (1, 2, 1, 1)
    regions = [strategy for name, strategy in decisions.ops.items() if any(s.label == "exchange" for s in strategy)]
    assert len(regions) == 2
