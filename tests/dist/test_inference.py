"""Plans for inference compute every output of the serial model, in float64, on real processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autopar.errors import InputError, VerifyError
from autopar.ir.inference import MODE_OPTION
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.ir.serialize import dump_plan
from autopar.ir.solution import Pins
from autopar.planner.execute import FLOAT64_TOLERANCE
from autopar.planner.infer import run_inference, verify_inference
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"layers": "4", "hidden": "32", "heads": "4", "vocab": "64", "seq": "16", "batch": "8", "dtype": "fp32"}
LLAMA = {**TINY, "kv_heads": "2", "ffn": "64"}
SMALL = {"layers": "2", "hidden": "32", "heads": "4", "vocab": "64", "seq": "32", "batch": "8"}


@dataclass(frozen=True)
class Case:
    """A model under pins; `num_outputs` that it returns."""

    source: str
    options: Mapping[str, str]
    pins: Pins
    num_outputs: int = 9
    gpu: str = field(default="cpu", kw_only=True)

    def plan(self) -> Plan:
        pins = self.pins
        count = (pins.dp or 1) * (pins.tp or 1) * (pins.pp or 1)
        request = PlanRequest(
            num_gpus=count, gpu=self.gpu, use_all=True, with_baselines=False, profile="none", pins=pins
        )
        source = self.source if "." not in self.source else str(EXAMPLES / self.source)
        return plan_model(source, {**self.options, MODE_OPTION: "inference"}, request)


def grid(dp: int, tp: int, pp: int, count: int = 1) -> Pins:
    return Pins(dp=dp, tp=tp, pp=pp, num_microbatches=count)


DECODE, UNFUSED = {"cache": "12"}, {"attention": "unfused", "positions": "alibi"}
FOUR = {
    "decode, tensor and pipeline": Case("llama", {**LLAMA, **DECODE}, grid(1, 2, 2, 4)),
    "decode, data and tensor": Case("gpt", {**TINY, **DECODE}, grid(2, 2, 1)),
    "prefill, data and pipeline": Case("llama", LLAMA, grid(2, 1, 2, 2)),
}
FURTHER = {
    "prefill, tensor": Case("gpt", {**TINY, **UNFUSED}, grid(1, 4, 1, 2)),
    "decode, pipeline, one sample at a time": Case("llama", {**LLAMA, **DECODE}, grid(1, 1, 4, 8)),
    "decode of alibi": Case("gpt", {**TINY, **DECODE, **UNFUSED, "kv_heads": "2"}, grid(2, 2, 1, 2)),
    "decode of the example llama": Case(
        "llama.py", {**SMALL, **DECODE, "kv_heads": "2", "ffn": "64", "dtype": "float32"}, grid(1, 2, 2, 2), 5
    ),
    "decode of the example gpt2": Case("gpt2.py", {**SMALL, **DECODE}, grid(2, 2, 1), 5),
    "the example t5": Case("t5.py", {**SMALL, "seq": "16"}, grid(2, 2, 1), 3),
    "the example bert": Case("bert.py", SMALL, grid(2, 2, 1), 1),
    "the example mlp, on GPUs": Case("mlp.py", {}, grid(2, 2, 1), 1, gpu="a100-sxm-80gb"),
    "searched freely": Case("llama", {**LLAMA, **DECODE, "hidden": "256"}, Pins(num_microbatches=2, pp=4)),
}
TWO = {
    "decode, tensor": Case("llama", {**LLAMA, **DECODE}, grid(1, 2, 1, 2)),
    "prefill, pipeline": Case("gpt", TINY, grid(1, 1, 2, 4)),
}


def check(num_processes: int, cases: Mapping[str, Case]) -> None:
    plans = {name: dump_plan(case.plan()) for name, case in cases.items()}
    found = run_on(num_processes, "tests.dist.inference_worker:plans", {"plans": plans})
    assert len(found) == num_processes
    for report in found[0]:
        assert report["num_outputs"] == cases[report["case"]].num_outputs, report
        assert report["output_error"] <= FLOAT64_TOLERANCE, report
        assert report["eager_error"] is not None
        assert report["eager_error"] <= 1e-5, report
    assert [report["case"] for report in found[0]] == list(cases)


def test_outputs_on_two_processes() -> None:
    check(2, TWO)


def test_outputs_on_four_processes() -> None:
    check(4, FOUR)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FURTHER))
def test_outputs_of_further_models_on_four_processes(name: str) -> None:
    check(4, {name: FURTHER[name]})


@pytest.mark.slow
def test_a_run_measures_passes_and_a_disagreement_is_an_error() -> None:
    plan, told = TWO["decode, tensor"].plan(), list[str]()
    run = run_inference(plan, RunSettings(steps=3), progress=told.append)
    assert (run.num_passes, run.latency.label) == (3, "measured")
    assert run.tokens_per_s is not None
    assert run.tokens_per_s.value == pytest.approx(8 / run.latency.value)
    assert [line.split(":")[0] for line in told[1:]] == [f"pass {i}/3" for i in range(1, 4)]
    with pytest.raises(VerifyError, match=r"the output .* differs by"):
        verify_inference(plan, tolerance=-1.0)


def test_settings_of_training_are_refused_before_anything_starts() -> None:
    plan = TWO["decode, tensor"].plan()
    with pytest.raises(InputError, match="nothing to do with clip_norm, checkpoints"):
        run_inference(plan, RunSettings(clip_norm=1.0, checkpoints="somewhere"))
