"""Memory of the built-in families against the analytic figures of Korthikanti et al. 2022, beside the checkout."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from autopar.cost.software import load_software
from autopar.ir.solution import Pins
from autopar.planner.estimate import price_configuration
from autopar.planner.plan import capture_graph
from autopar.planner.request import PlanRequest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "published" / "korthikanti_calculon.csv"
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason="the published tables are not beside the checkout")
GIB = 2**30
MODELS = ("megatron-22B", "gpt3-175B")


def rows() -> list[dict[str, str]]:
    if not DATA.is_file():
        return []
    with DATA.open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["model"] in MODELS]


def options_of(row: dict[str, str]) -> dict[str, str]:
    """Attention in memory with dropout, as Megatron-LM had it then; the batch is that of one model replica."""
    same = {"seq": "2048", "vocab": "51200", "dtype": "fp16", "attention": "unfused", "dropout": "0.1"}
    return {name: row[name] for name in ("layers", "hidden", "heads")} | {"batch": row["gbs"]} | same


@cache
def activations(model: str, policy: str, *, sequence: bool) -> tuple[float, float]:
    """GiB of states and activations on the first rank."""
    row = next(row for row in rows() if row["model"] == model)
    options, vpp = options_of(row), int(row["vpp"])
    pins = Pins(
        dp=1, tp=8, pp=int(row["pp"]), num_microbatches=int(row["gbs"]) // int(row["mbs"]), recompute=policy,
        sequence=sequence, schedule="1f1b", interleave=vpp if vpp > 1 else None, even_cuts=True,
    )  # fmt: skip
    request = PlanRequest(
        num_gpus=int(row["n_gpus"]), gpu="a100-sxm-80gb", pins=pins, software=load_software("megatron"), use_all=True
    )
    captured = capture_graph("gpt", options, None)
    causes = price_configuration("gpt", options, request, captured=captured).planned.plan.predicted.stages[0]
    found = causes.memory_by_cause
    return sum(found[c] for c in ("parameters", "gradients", "optimizer")) / GIB, found["activations"] / GIB


def figure(row: dict[str, str], pattern: str) -> float:
    found = re.search(pattern, row["mem_kind"])
    assert found is not None
    return float(found.group(1))


@pytest.mark.parametrize("row", [row for row in rows() if row["mem_gib"]], ids=lambda row: str(row["row_id"]))
def test_states_and_activations_are_those_of_the_figure(row: dict[str, str]) -> None:
    state, kept = activations(row["model"], row["recompute"], sequence=row["sp"] == "yes")
    # the figure leaves out embeddings
    assert 0 <= state / figure(row, r"optimizer ([\d.]+) GiB") - 1 <= 0.04
    assert kept == pytest.approx(figure(row, r"activations ([\d.]+) GiB"), rel=0.03)


@pytest.mark.parametrize("row", [row for row in rows() if not row["mem_gib"]], ids=lambda row: str(row["row_id"]))
def test_policies_keep_the_published_share(row: dict[str, str]) -> None:
    baseline = activations(row["model"], "none", sequence=False)[1]
    kept = activations(row["model"], row["recompute"], sequence=row["sp"] == "yes")[1]
    near = 0.6
    if row["recompute"] == "full":
        # the figure counts inputs of layers alone, not the layer that is computed again, nor what a stage sends on
        near = 1.1
        waves = 1 + (int(row["pp"]) - 1) / (int(row["pp"]) * int(row["vpp"]))
        kept -= baseline / waves / int(row["layers"])
    assert 100 * kept / baseline == pytest.approx(figure(row, r"= ([\d.]+) %"), abs=near)
