"""`autopar study`: policies priced and run, in text and JSON, every figure with its label."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import Cli

ON = ("study", "model.py", "--gpu", "cpu", "--set", "width=64", "--set", "batch=64")


def test_every_policy_is_priced_on_every_number_of_workers(cli: Cli) -> None:
    content = cli(*ON, "--workers", "4,1,2", "--policies", "all-reduce,ps-async,local=4", "--json").json
    assert content["device"] == "cpu"
    assert [(case["policy"], case["num_workers"], case["num_processes"]) for case in content["cases"]] == [
        (policy, count, count + (policy == "ps-async"))
        for count in (1, 2, 4)
        for policy in ("all-reduce", "ps-async", "local=4")
    ]
    serial = content["cases"][0]["predicted"]
    for case in content["cases"]:
        found = case["predicted"]
        for name, unit in (("step_time_s", "s"), ("energy_j", "J"), ("average_power_w", "W")):
            assert found[name]["unit"] == unit
            assert found[name]["label"] == "modelled"
        assert found["speedup"] == pytest.approx(serial["step_time_s"]["value"] / found["step_time_s"]["value"])
        assert found["energy_ratio"] == pytest.approx(found["energy_j"]["value"] / serial["energy_j"]["value"])
        assert found["staleness"] == (case["num_workers"] - 1 if case["policy"] == "ps-async" else 0)
        assert found["steps_apart"] == (3 if case["policy"] == "local=4" else 0)
        assert case["measured"] is None


def test_break_even_is_where_the_figures_say(cli: Cli) -> None:
    content = cli(*ON, "--workers", "1,2,4,8", "--policies", "all-reduce,ps-sync", "--json").json
    serial = content["cases"][0]["predicted"]["energy_j"]["value"]
    for found in content["break_even"]["predicted"]:
        cases = [case for case in content["cases"] if case["policy"] == found["policy"] and case["num_workers"] > 1]
        joules = {1: serial} | {case["num_workers"]: case["predicted"]["energy_j"]["value"] for case in cases}
        assert found["least_energy_workers"] == min(joules, key=lambda count: (joules[count], count))
        cheaper = [count for count, value in joules.items() if count > 1 and value < serial]
        assert found["cheaper_than_serial_up_to"] == (max(cheaper) if cheaper else None)


def test_the_report_fits_and_names_what_is_left_out(cli: Cli) -> None:
    text = cli(*ON, "--workers", "1,2,3", "--policies", "all-reduce,ps-async+top-k=0.1,all-reduce+power-sgd=2").out
    assert max(map(len, text.splitlines())) <= 80
    assert "3 workers not priced: a batch of 64 does not divide over 3 workers" in text
    assert "modelled" in text


def test_the_picture_is_drawn(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli(*ON, "--workers", "1,2", "--policies", "all-reduce,ps-sync", "--plot", "study.svg").code == 0
    assert "<svg" in (tmp_path / "study.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policies", "ring"), "unknown policy"),
        (("--workers", "0"), "--workers"),
        (("--measure", "--gpu", "h100-sxm-80gb"), "processor"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    outcome = cli("study", "model.py", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.dist
def test_measured_figures_stand_beside_predicted_ones(cli: Cli) -> None:
    asked = ("--workers", "1,2,4", "--measure", "--measure-most", "2", "--measure-steps", "4")
    content = cli(*ON, *asked, "--policies", "all-reduce,local=2", "--json").json
    run = [case for case in content["cases"] if case["num_workers"] <= 2]
    assert all(case["not_run"] for case in content["cases"] if case["num_workers"] == 4)
    for case in run:
        measured = case["measured"]
        assert measured["step_time_s"]["label"] == "measured"
        assert measured["energy_j"]["label"] in ("measured", "modelled")
        assert measured["energy_j"]["value"] > 0
        assert measured["average_power_w"]["label"] == measured["energy_j"]["label"]
        assert measured["staleness"] == {"0": 4 * case["num_workers"]}
        # Every policy sees the same samples in a step, so the first losses agree.
        assert measured["losses"][0] == pytest.approx(run[0]["measured"]["losses"][0], rel=1e-5)
    assert content["break_even"]["measured"]
