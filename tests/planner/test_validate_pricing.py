"""`validate` prices what `estimate` prices, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopar.cost.software import load_software
from autopar.ir.solution import Pins
from autopar.ir.validation import ValidatedRow, Validation
from autopar.planner import validate
from autopar.planner.estimate import estimate_model
from autopar.planner.plan import make_plan
from autopar.planner.request import PlanRequest
from autopar.planner.validate import validate_tables
from autopar.units import GIB
from tests.planner.published_rows import row, write_table

ROWS = [
    row(row_id="tp", mem_gib="3", mem_kind="peak allocated", power_w_per_gpu="300"),
    row(row_id="bad", tp="two"),
    row(row_id="sp", sp="yes"),
    row(row_id="pp", tp="1", pp="2", recompute="full"),
    row(row_id="oom", status="OOM", iter_time_s=""),
    row(row_id="unknown", layers="", config_quality="C"),
    row(row_id="silent", iter_time_s=""),
    row(row_id="failed", status="failed"),
    row(row_id="ratio", recompute="selective", iter_time_s="", mem_kind="activations = 60 % of baseline (ratio)"),
    row(row_id="formula", iter_time_s="", mem_gib="1", mem_kind="analytic, first stage"),
]


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> Validation:
    return validate_tables([write_table(tmp_path_factory.mktemp("t") / "small.csv", ROWS)], jobs=1)


def named(found: Validation, name: str) -> ValidatedRow:
    return next(r for r in found.rows if r.row_id == name)


def test_rows_come_back_in_order_with_their_reasons(priced: Validation) -> None:
    assert [r.row_id for r in priced.rows] == [r["row_id"] for r in ROWS]
    assert {r.source for r in priced.rows} == {"small"}
    reasons = {r.row_id: r.skipped for r in priced.rows if r.skipped}
    assert reasons == {
        "bad": "bad row",
        "unknown": "dimensions unknown: no layers",
        "silent": "nothing was measured",
        "failed": "the run failed",
    }
    assert [fault.column for fault in named(priced, "bad").faults] == ["tp"]


def test_estimate_gives_bit_equal_figures(priced: Validation) -> None:
    options = {
        "layers": "4", "hidden": "512", "heads": "8", "vocab": "1000", "seq": "128", "dtype": "fp16",
        "attention": "unfused", "dropout": "0.1", "pad_vocab_to": "256",
    }  # fmt: skip
    request = PlanRequest(
        num_gpus=4, gpu="a100-sxm-80gb", batch_size=16, clocks="max", profile="none", use_all=True,
        software=load_software("megatron"),
        pins=Pins(
            dp=2, tp=2, pp=1, num_microbatches=2, recompute="none", schedule="1f1b", zero=0, sequence=False,
        ),
    )  # fmt: skip
    predicted = estimate_model("gpt", options, request).pinned.planned.plan.predicted
    found = named(priced, "tp")
    assert found.time_s.predicted == predicted.step_time_s
    assert found.memory_gib.predicted is not None
    assert found.memory_gib.predicted.value == max(peak.value for peak in predicted.peak_memory_bytes) / GIB
    planned = make_plan("gpt", options, request).plan.predicted
    assert planned.step_time_s == predicted.step_time_s


def test_energy_is_that_of_the_gpus(priced: Validation) -> None:
    energy = named(priced, "tp").energy_j
    assert energy.measured == pytest.approx(0.05 * 300 * 4)
    assert energy.predicted is not None
    time_s = named(priced, "tp").time_s.predicted
    assert time_s is not None
    assert 4 * 50 * time_s.value < energy.predicted.value < 4 * 500 * time_s.value


def test_choices_in_the_row_change_the_price(priced: Validation) -> None:
    values = {name: named(priced, name).time_s.predicted for name in ("tp", "sp", "pp")}
    assert len({value.value for value in values.values() if value is not None}) == 3


def test_memory_labels(priced: Validation) -> None:
    oom = named(priced, "oom")
    assert (oom.is_oom, oom.predicted_oom) == (True, False)
    assert oom.memory_gib.predicted is not None
    assert named(priced, "tp").is_oom is False
    assert named(priced, "formula").is_oom is None


def test_ratios_compare_activations_with_those_of_tensor_parallelism_alone(priced: Validation) -> None:
    ratio = named(priced, "ratio")
    assert ratio.kind == "ratio"
    assert ratio.memory_gib.measured == pytest.approx(0.6)
    assert ratio.memory_gib.predicted is not None
    assert 0.2 < ratio.memory_gib.predicted.value < 1
    assert ratio.predicted_oom is False


def test_formulas_count_states_and_activations_alone(priced: Validation) -> None:
    whole, counted = named(priced, "tp").memory_gib.predicted, named(priced, "formula").memory_gib.predicted
    assert whole is not None
    assert counted is not None
    assert counted.value < whole.value


def test_processes_change_nothing(priced: Validation, tmp_path: Path) -> None:
    path = write_table(tmp_path / "small.csv", ROWS)
    assert validate_tables([path], jobs=2) == priced


def test_a_model_that_cannot_be_captured_is_a_reason(tmp_path: Path) -> None:
    odd = row(model="llama", hidden="24", heads="8", vocab="100", iter_time_s="0.0001")
    path = write_table(tmp_path / "t.csv", [odd, row(row_id="T-1")])
    found = validate_tables([path], jobs=1)
    assert "even width" in found.rows[0].skipped
    assert found.rows[1].time_s.predicted is not None


def test_the_free_plan_is_sought_on_request(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [row()])
    found = validate_tables([path], jobs=1, free=True).rows[0]
    assert found.free_s is not None
    assert found.time_s.predicted is not None
    assert found.free_s <= found.time_s.predicted.value * (1 + 1e-9)


def test_a_mistake_of_ours_is_told_of_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_price = validate.price_configuration

    def fail(source: str, options: dict[str, str], request: PlanRequest, **rest: Any) -> Any:
        if request.pins.recompute == "full":
            raise KeyError("planted")
        return true_price(source, options, request, **rest)

    monkeypatch.setattr(validate, "price_configuration", fail)
    path = write_table(tmp_path / "t.csv", [row(recompute="full"), row(row_id="T-1")])
    found = validate_tables([path], jobs=1)
    assert found.rows[0].skipped == "a bug of autopar: KeyError: 'planted'"
    assert found.rows[0].time_s.predicted is None
    assert found.rows[1].time_s.predicted is not None
