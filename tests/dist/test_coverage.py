"""What a run may add to a plan - clipping, precision, ... - gives the numbers of plain torch on one device."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from autopar.capture.precision import in_precision
from autopar.cli.pins import parse_pins
from autopar.planner.execute import verify_plan
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from tests.dist.models import ROOT, source
from tests.dist.ranks import run_on
from tests.dist.test_decisions import TOLERANCE, check, errors_on

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_over_shards_is_that_of_torch_on_one_device(limit: float) -> None:
    check(errors_on(2, "coverage_worker:clip_cases", models=("toy/transformer", "toy/skip"), limit=limit), at_least=14)


def precision_rows(model: str, plans: list[str], rate: float, steps: int) -> list[dict[str, Any]]:
    """What the first of two ranks found for each plan, with and without a copy in float32."""
    arguments = {"models": [model], "rates": [rate], "steps": steps, "plans": plans}
    rows: list[dict[str, Any]] = run_on(2, "tests.dist.coverage_worker:precision_cases", arguments)[0]
    assert len(rows) == 2 * len(plans)
    return rows


def test_bf16_with_a_copy_in_float32_follows_float32_and_without_it_small_updates_are_lost() -> None:
    rows = precision_rows("gpt2", ["zero1", "zero2", "1f1b recompute"], rate=1e-5, steps=8)
    copied = [row for row in rows if row["case"][-1]]
    assert max(row["loss"] for row in copied) < 1e-3
    assert max(row["strayed"] for row in copied) < 0.1
    assert min(row["strayed"] for row in rows if row not in copied) > 0.8


def test_bf16_keeps_batch_norms_in_float32() -> None:
    model = in_precision(source("toy/conv"), "bf16").build_model()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "norms" in name} == {torch.float32, torch.int64}
    assert {dtype for name, dtype in dtypes.items() if "norms" not in name} == {torch.bfloat16}
    rows = precision_rows("toy/conv", ["zero3", "tensor"], rate=1e-3, steps=4)
    assert max(row["loss"] for row in rows if row["case"][-1]) < 1e-2


def test_dropout_is_the_same_under_every_plan_and_number_of_microbatches() -> None:
    check(errors_on(2, "coverage_worker:dropout_cases"), at_least=16)


@pytest.mark.parametrize(
    ("model", "plans"), [("toy/transformer", ["zero3", "1f1b recompute"]), ("toy/conv", ["tensor"])]
)
def test_compiled_stages_compute_what_plain_ones_do(model: str, plans: list[str]) -> None:
    errors = errors_on(2, "coverage_worker:compile_cases", models=[model], backend="aot_eager", plans=plans)
    check(errors, at_least=len(plans))


@pytest.mark.slow
def test_the_compiler_that_runs_use_computes_what_plain_stages_do() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler, which torch.compile needs on a CPU")
    plans = ("zero1", "tensor")
    check(
        errors_on(2, "coverage_worker:compile_cases", models=("toy/skip",), backend="inductor", plans=plans), at_least=2
    )


def test_scheme_a_of_one_weird_trick_runs_on_alexnet() -> None:
    options = {"width": "8", "hidden": "32", "classes": "8", "image": "64", "batch": "8"}
    request = PlanRequest(2, gpu="cpu", use_all=True, pins=parse_pins("pp=1,m=2,owt=a").pins, with_baselines=False)
    plan = plan_model(str(ROOT / "examples" / "alexnet.py"), options, request)
    labels = {name: axis.label for name, (axis,) in plan.decisions.ops.items()}
    assert {label for name, label in labels.items() if name.startswith("conv2d")} == {"dim0"}
    assert {label for name, label in labels.items() if name.startswith("linear")} == {"columns"}
    assert verify_plan(plan).worst_gradient_error <= TOLERANCE
