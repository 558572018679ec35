"""`autopar replan`: from the model to another plan, picked or computed."""

from __future__ import annotations

import pytest

from autopar.ir.serialize import load_plan
from autopar.planner import replan as replanning
from tests.cli.helpers import Cli
from tests.cli.test_sweep import WIDE_MODEL

ON = ("wide.py", "--gpu", "h100-sxm-80gb", "--set", "width=4096", "--set", "batch=4096")


def no_search(*_: object) -> None:
    raise AssertionError("this was to be picked")


def test_frontier_then_pick_without_a_search(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.write("wide.py", WIDE_MODEL)
    points = cli("frontier", *ON, "--gpus", "4", "--points", "8", "--out-dir", "fr", "--json").json["points"]
    assert load_plan("fr/plan_00.json").objective.kind == "time"
    monkeypatch.setattr(replanning, "finished_plan", no_search)
    deadline_s = 1.1 * points[0]["step_time_s"]["value"]
    least = min(p["energy_j"]["value"] for p in points if p["step_time_s"]["value"] <= deadline_s)
    asked = ("replan", "fr/plan_00.json", "--deadline", f"{deadline_s * 1e6:.3f}us")
    content = cli(*asked, "--out", "new.json", "--json").json
    assert content["predicted"]["energy_j"]["value"] == least
    assert content["num_stored"] == len(points)
    new = load_plan("new.json")
    assert (new.predicted.energy_j.value, new.objective.kind) == (least, "energy")
    assert new.limits.deadline_s == pytest.approx(deadline_s, rel=1e-6)
    text = cli(*asked)
    assert text.code == 0
    assert "without a search" in " ".join(text.out.split())
    assert max(map(len, text.out.splitlines())) <= 80
    assert cli("replan", "new.json", "--deadline", "1h", "--json").json["predicted"]["energy_j"]["value"] == min(
        p["energy_j"]["value"] for p in points
    )


def test_what_no_store_holds_is_computed_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.write("wide.py", WIDE_MODEL)
    assert cli("plan", *ON, "--gpus", "2", "--use-all", "--clocks", "max", "--out", "two.json").code == 0
    lazy = cli("replan", "two.json", "--objective", "energy", "--no-compute", "--json").json
    assert (lazy["how"], lazy["remarks"]) == ("kept", [])
    first = cli("replan", "two.json", "--gpus", "1", "--out", "one.json", "--json").json
    assert (first["how"], first["num_gpus"]) == ("computed", 1)
    alone = cli("plan", *ON, "--gpus", "1", "--clocks", "max", "--json").json
    assert load_plan("one.json").predicted.step_time_s.value == alone["predicted"]["step_time_s"]["value"]
    assert cli("explain", "one.json").code == 0
    monkeypatch.setattr(replanning, "finished_plan", no_search)
    again = cli("replan", "two.json", "--gpus", "1", "--json").json
    assert (again["how"], again["predicted"], again["remarks"]) == ("picked", first["predicted"], [])
    more = cli("replan", "two.json", "--gpus", "4", "--no-compute", "--json").json
    assert "up to 4 GPUs" in more["remarks"][0]


def test_sweep_fills_the_store_for_fewer_gpus(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.write("wide.py", WIDE_MODEL)
    points = cli("sweep", *ON, "--gpus", "1,2", "--json").json["points"]
    assert cli("plan", *ON, "--gpus", "2", "--use-all", "--out", "two.json").code == 0
    monkeypatch.setattr(replanning, "finished_plan", no_search)
    found = cli("replan", "two.json", "--gpus", "1", "--json").json
    assert found["predicted"]["step_time_s"] == points[0]["step_time_s"]


def test_infeasible_is_3_and_says_what_is_needed(cli: Cli) -> None:
    assert cli("plan", "model.py", "--gpu", "h100-sxm-80gb", "--gpus", "2").code == 0
    for more in ((), ("--no-compute",)):
        outcome = cli("replan", "plan.json", "--deadline", "1us", *more, "--json")
        assert outcome.code == 3
        assert "--deadline" in outcome.json["error"]["remedies"][0]["change"]


BAD = {
    "nothing": ((), "nothing has changed"),
    "no GPUs": (("--gpus", "0"), "--gpus"),
    "a negative price": (("--price", "-1"), "--energy-price"),
    "PUE below 1": (("--price", "1", "--pue", "0.5"), "--pue"),
    "a missing store": (("--gpus", "1", "--store", "nowhere"), "nowhere"),
    "pins without a search": (("--gpus", "1", "--pin", "dp=1", "--no-compute"), "--pin"),
    "another batch": (("--gpus", "1", "--pin", "gbs=64"), "batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_2(cli: Cli, case: str) -> None:
    arguments, message = BAD[case]
    cli.write("wide.py", WIDE_MODEL)
    assert cli("plan", *ON, "--gpus", "1").code == 0
    outcome = cli("replan", "plan.json", *arguments)
    assert (outcome.code, message in outcome.err) == (2, True)


def test_a_changed_model_is_not_replanned(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    assert cli("plan", *ON, "--gpus", "2").code == 0
    cli.write("wide.py", WIDE_MODEL.replace("GELU", "ReLU"))
    outcome = cli("replan", "plan.json", "--objective", "energy", "--compute")
    assert (outcome.code, "has changed" in outcome.err) == (2, True)
