"""`explain --savings` and `clocks --straggler`."""

from __future__ import annotations

from pathlib import Path

from tests.cli.helpers import Cli

ON = ("gpt", "--gpus", "2", "--gpu", "a100-sxm-80gb", "--profile", "none", "--pin", "pp=2,m=4")
SIZE = ("--set", "layers=2", "--set", "hidden=1024", "--set", "heads=16", "--set", "seq=512", "--set", "vocab=512")


def test_the_saving_of_an_energy_plan_is_split(cli: Cli) -> None:
    made = cli("plan", *ON, *SIZE, "--batch", "8", "--objective", "energy", "--out", "e.json", "--json")
    assert made.code == 0, made.err
    found = cli("explain", "e.json", "--savings", "--pin", "pp=2,m=4", "--report", "page.html", "--json")
    assert found.code == 0, found.err
    split = found.json["savings"]
    assert [step["cause"] for step in split["steps"]] == ["parallelisation", "number of GPUs", "clocks"]
    energy_j = made.json["predicted"]["energy_j"]
    assert split["steps"][-1]["energy_j"] == energy_j
    assert split["fastest"]["energy_j"]["value"] - split["saved_j"] == energy_j["value"]
    assert energy_j["label"] == "modelled"
    assert "<h2>Savings</h2>" in Path("page.html").read_text()
    told = cli("explain", "e.json", "--savings", "--pin", "pp=2,m=4")
    assert told.code == 0
    assert max(map(len, told.out.splitlines())) <= 80
    assert "clocks alone, in the plan's time" in told.out
    late = cli("clocks", "e.json", "--straggler", "1.2x@1", "--json")
    assert late.json["straggler"]["rank"] == 1
    assert late.json["chosen"]["saving"] > 0
    assert "whatever these clocks are" in cli("clocks", "e.json", "--straggler", "1.2x").out


def test_what_makes_no_sense_is_said(cli: Cli) -> None:
    assert cli("plan", "model.py", "--gpus", "1", "--gpu", "a100-sxm-80gb", "--profile", "none").code == 0
    assert "plan of least time" in cli("explain", "plan.json", "--savings").err
    pinned = cli("explain", "plan.json", "--pin", "dp=1")
    assert pinned.code == 2
    assert "--savings" in pinned.err
    for text in ("0.5x", "1.2.3x", "slow", "1.2x@9"):
        outcome = cli("clocks", "plan.json", "--straggler", text)
        assert outcome.code == 2, outcome.out
        assert len(outcome.err.splitlines()) <= 3
