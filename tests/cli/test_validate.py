"""`autopar validate`: the machine-readable contract, the printed tables, the picture, exit codes."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from autopar.report.figure import INSTALL_PLOT
from tests.cli.helpers import Cli
from tests.planner.published_rows import row, write_table

ROWS = [
    row(row_id="T-0", mem_gib="3", mem_kind="peak allocated"),
    row(row_id="T-1", mbs="2"),
    row(row_id="T-2", dp="two"),
    row(row_id="T-3", status="OOM", iter_time_s=""),
    row(row_id="T-4", hardware="TPU v4"),
]
ROW_KEYS = {
    "row_id", "source", "measured_s", "predicted_s", "measured_memory_gib", "predicted_memory_gib", "measured_j",
    "predicted_j", "skipped",
}  # fmt: skip
SUMMARY_KEYS = {"n", "median_ape_s", "p90_ape_s", "median_ape_memory", "kendall_tau"}


@pytest.fixture
def table(cli: Cli) -> str:
    write_table(cli.directory / "small.csv", ROWS)
    return "small.csv"


def test_json_keeps_the_contract(cli: Cli, table: str) -> None:
    outcome = cli("validate", table, "--jobs", "1", "--json")
    assert outcome.code == 0
    rows, summary = outcome.json["rows"], outcome.json["summary"]
    assert [found["row_id"] for found in rows] == ["T-0", "T-1", "T-2", "T-3", "T-4"]
    assert all(found.keys() >= ROW_KEYS and found["source"] == "small" for found in rows)
    first, _, bad, oom, foreign = rows
    assert first["measured_s"] == 0.05
    assert first["predicted_s_low"] <= first["predicted_s"] <= first["predicted_s_high"]
    assert (first["measured_memory_gib"], first["measured_j"], first["skipped"]) == (3.0, None, None)
    assert (bad["predicted_s"], bad["measured_s"], bad["skipped"]) == (None, None, "bad row")
    assert [fault["column"] for fault in bad["faults"]] == ["dp"]
    assert (oom["measured_oom"], oom["predicted_oom"]) == (True, False)
    assert "no cost model" in foreign["skipped"]
    assert foreign["predicted_s"] is None
    assert summary.keys() == {"small"}
    assert summary["small"].keys() >= SUMMARY_KEYS
    assert summary["small"]["n"] == 3
    errors = [abs(found["predicted_s"] / found["measured_s"] - 1) for found in rows[:2]]
    assert summary["small"]["median_ape_s"] == pytest.approx(sum(errors) / 2)
    assert summary["small"]["kendall_tau"] in (-1.0, 1.0, None)


def test_the_report_fits_and_names_what_was_left_out(cli: Cli, table: str) -> None:
    outcome = cli("validate", table, "--jobs", "1")
    assert outcome.code == 0
    assert max(len(line) for line in outcome.out.splitlines()) <= 80
    words = " ".join(outcome.out.split())
    assert "small, row T-2, column dp: not a number: 'two'" in words
    assert "no cost model of the GPU 'TPU v4'" in words
    assert "OOM" in words
    assert "wrong" in words
    assert cli("validate", table, "--jobs", "1").out == outcome.out


def test_the_picture(cli: Cli, table: str) -> None:
    pytest.importorskip("matplotlib")
    assert cli("validate", table, "--jobs", "1", "--plot", "out.svg").code == 0
    assert "<svg" in (cli.directory / "out.svg").read_text()


def test_without_matplotlib_the_way_out_is_said(cli: Cli, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def fail(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    outcome = cli("validate", table, "--plot", "out.svg")
    assert outcome.code == 2
    assert INSTALL_PLOT in outcome.err


CASES: Mapping[str, tuple[Sequence[str], str]] = {
    "no such file": (["none.csv"], "cannot be read"),
    "no table": (["model.py"], "no header"),
    "no processes": (["small.csv", "--jobs", "0"], "--jobs must be at least 1"),
    "no place for the picture": (["small.csv", "--plot", "none/out.svg"], "none"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_exit_code_2(name: str, cli: Cli, table: str) -> None:
    arguments, words = CASES[name]
    outcome = cli("validate", *arguments)
    assert outcome.code == 2
    assert words in outcome.err


def test_estimate_gives_bit_equal_figures(cli: Cli) -> None:
    write_table(cli.directory / "one.csv", [row(sp="yes", recompute="full", gbs="32")])
    sizes = {"layers": 4, "hidden": 512, "heads": 8, "vocab": 1000, "seq": 128, "pad_vocab_to": 256}
    stack = {"attention": "unfused", "dropout": 0.1}
    settings = [part for key, value in (sizes | stack).items() for part in ("--set", f"{key}={value}")]
    pins = "dp=2,tp=2,pp=1,mbs=4,gbs=32,sp=on,recompute=full,schedule=1f1b,zero=0,dtype=fp16,software=megatron"
    where = ("--gpus", "4", "--gpu", "a100-sxm-80gb", "--clocks", "max", "--profile", "none", "--use-all")
    estimated = cli("estimate", "gpt", *settings, *where, "--pin", pins, "--json").json["predicted"]
    (found,) = cli("validate", "one.csv", "--jobs", "1", "--json").json["rows"]
    assert found["predicted_s"] == estimated["step_time_s"]["value"]
    peak = max(quantity["value"] for quantity in estimated["peak_memory_bytes"])
    assert found["predicted_memory_gib"] == peak / 2**30
