"""Commands that succeed: what they print, what they write, and that equal inputs give equal bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopar.cli.quantities import parse_bytes, parse_joules, parse_rate, parse_seconds, parse_watts
from autopar.errors import InputError
from autopar.ir.serialize import load_plan, plan_digest
from tests.cli.helpers import Cli

PLAN = ("plan", "model.py", "--gpus", "2", "--gpu", "h100-sxm-80gb")


def test_plan_writes_the_file_it_reports(cli: Cli) -> None:
    outcome = cli(*PLAN, "--out", "mine.json")
    assert outcome.code == 0
    plan = load_plan("mine.json")
    assert "mine.json" in outcome.out
    assert f"{plan.decisions.num_gpus} of 2 GPUs" in outcome.out


def test_plan_json_is_the_file(cli: Cli) -> None:
    outcome = cli(*PLAN, "--json")
    assert outcome.json == json.loads(Path("plan.json").read_text())
    assert outcome.err == ""


def test_the_machine_readable_contract(cli: Cli) -> None:
    content = cli(*PLAN, "--json").json
    for name, unit in (("step_time_s", "s"), ("energy_j", "J"), ("average_power_w", "W"), ("peak_power_w", "W")):
        quantity = content["predicted"][name]
        assert quantity.keys() == {"value", "unit", "label", "low", "high"}
        assert quantity["unit"] == unit
        assert quantity["low"] <= quantity["value"] <= quantity["high"]
    assert len(content["predicted"]["peak_memory_bytes"]) == len(content["decisions"]["stages"])
    assert {"status", "objective", "bound", "gap", "wall_s"} <= content["solver"].keys()
    assert content["solver"]["bound"] <= content["solver"]["objective"]


@pytest.mark.parametrize("objective", ["time", "energy", "edp", "weighted"])
def test_same_inputs_give_the_same_plan(objective: str, cli: Cli) -> None:
    for name in ("a.json", "b.json"):
        assert cli(*PLAN, "--objective", objective, "--no-cache", "--out", name).code == 0
    assert plan_digest(load_plan("a.json")) == plan_digest(load_plan("b.json"))


def test_limits_are_kept_and_written(cli: Cli) -> None:
    free = cli(*PLAN, "--json").json["predicted"]
    causes, step_s = free["energy_by_cause"], free["step_time_s"]["value"]
    watts = (causes["blocked"] + causes["host"] + causes["dynamic"] / 2) / step_s
    flags = ("--power-cap", f"{watts:.6f}W", "--deadline", "1s", "--energy-budget", "1kJ", "--peak-power", "2kW")
    content = cli(*PLAN, *flags, "--json").json
    assert content["limits"]["average_power_w"] == pytest.approx(watts, rel=1e-4)
    assert content["limits"] | {"average_power_w": 0} == {
        "deadline_s": 1.0, "energy_j": 1000.0, "average_power_w": 0, "peak_power_w": 2000.0,
    }  # fmt: skip
    assert content["predicted"]["average_power_w"]["value"] <= watts * (1 + 1e-6)


def test_cost_is_gpu_hours_and_energy_at_the_prices_given(cli: Cli) -> None:
    priced = ("--objective", "cost", "--gpu-hour-price", "2", "--energy-price", "0.36")
    content = cli(*PLAN, *priced, "--json").json
    predicted, used = content["predicted"], 1
    for axis in content["decisions"]["mesh"].split(","):
        used *= int(axis.partition("=")[2])
    cost = 2 / 3600 * used * predicted["step_time_s"]["value"] + 1e-7 * predicted["energy_j"]["value"]
    assert content["solver"]["objective"] == pytest.approx(cost)


def test_pins_are_obeyed(cli: Cli) -> None:
    assert cli(*PLAN, "--pin", "pp=2,m=4,schedule=gpipe,recompute=full").code == 0
    decisions = load_plan("plan.json").decisions
    assert (len(decisions.stages), decisions.num_microbatches, decisions.schedule) == (2, 4, "gpipe")
    assert {stage.recompute for stage in decisions.stages} == {"full"}


def test_use_all_uses_all(cli: Cli) -> None:
    assert cli(*PLAN, "--use-all").code == 0
    assert load_plan("plan.json").decisions.num_gpus == 2


def test_without_a_gpu_the_default_is_stated_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.planner.detect.detect_gpus", lambda: ())
    outcome = cli("plan", "model.py", "--gpus", "2")
    assert "the default" in "\n".join(outcome.out.splitlines()[:4])
    assert load_plan("plan.json").cluster.origin == "default"


def test_a_detected_gpu_is_planned_for(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.planner.detect.detect_gpus", lambda: ("NVIDIA L4", "NVIDIA L4"))
    assert cli("plan", "model.py", "--gpus", "2").code == 0
    cluster = load_plan("plan.json").cluster
    assert (cluster.gpu, cluster.origin) == ("l4", "detected")


def test_gpus_lists_every_device_and_the_default(cli: Cli) -> None:
    content = cli("gpus", "--json").json
    names = [gpu["name"] for gpu in content["gpus"]]
    assert names == sorted(names)
    assert content["default"] in names
    assert all(line in cli("gpus").out for line in names)


def test_explain_says_where_it_goes_and_why_not(cli: Cli) -> None:
    cli(*PLAN)
    assert "Time" in cli("explain", "plan.json").out
    content = cli("explain", "plan.json", "--why-not", "pp=2", "--json").json
    assert content["rival"]["time_ratio"] >= 1 - 1e-9


def test_a_profile_is_preferred_and_said_so(cli: Cli) -> None:
    measured = cli("profile", "model.py", "--json")
    assert measured.json["num_rows"] == measured.json["num_measured"] > 0
    on_cpu = ("plan", "model.py", "--gpus", "1", "--gpu", "cpu", "--pin", "m=1")  # at the size that was measured
    content = cli(*on_cpu, "--json").json
    assert content["predicted"]["sources"]["measured"] > 0
    assert any("measured rows" in note for note in content["notes"])
    without = cli(*on_cpu, "--profile", "none", "--json").json
    assert without["predicted"]["sources"].get("measured", 0) == 0
    assert without["cluster"]["input_hash"] != content["cluster"]["input_hash"]


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("autopar, version ")


@pytest.mark.parametrize(("text", "size"), [("46GiB", 46 * 2**30), ("80 GB", 80 * 10**9), ("1.5kb", 1500), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "joules"), [("1.2kJ", 1200), ("2 MJ", 2e6), ("3mJ", 3e-3), ("1kWh", 3.6e6), ("7", 7)])
def test_energies(text: str, joules: float) -> None:
    assert parse_joules(text) == pytest.approx(joules)


@pytest.mark.parametrize(("text", "watts"), [("40kW", 40e3), ("700W", 700), ("0.5MW", 5e5)])
def test_powers(text: str, watts: float) -> None:
    assert parse_watts(text) == pytest.approx(watts)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("800Gbit/s", 100e9), ("800 Gbit", 100e9), ("1.6Tbps", 200e9), ("100GB/s", 100e9), ("8Gb/s", 1e9)],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["800", "800gb/s", "800G", "0GB/s", "8GB/h"])
def test_rates_without_a_clear_unit_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_rate(text)


@pytest.mark.parametrize("text", ["1KJ", "1kj", "40 kilowatts", "-3W", "inf", "1e3W"])
def test_ambiguous_units_are_refused(text: str) -> None:
    for parse in (parse_joules, parse_watts):
        with pytest.raises(InputError):
            parse(text)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("500ms", 0.5), ("2min", 120), ("1", 1)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)
