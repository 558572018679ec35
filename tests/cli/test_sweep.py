"""The sweep over numbers of GPUs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.sweep import parse_counts
from autopar.clocks.hold import Held
from autopar.errors import InputError, WorkerError
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.planner.execute import RunReport
from autopar.planner.run_energy import RunEnergy
from tests.cli.helpers import MODEL, Cli

ON = ("wide.py", "--gpu", "h100-sxm-80gb", "--set", "width=4096", "--set", "batch=4096")
WIDE_MODEL = MODEL.replace("Linear(4, width)", "Linear(4, width), torch.nn.Linear(width, width)")


def test_each_point_is_the_plan_on_that_many_gpus(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("sweep", *ON, "--gpus", "4,1,2", "--objective", "energy", "--json").json
    points = content["points"]
    assert [point["num_gpus"] for point in points] == [1, 2, 4]
    for point in points:
        plan = cli("plan", *ON, "--gpus", str(point["num_gpus"]), "--use-all", "--objective", "energy", "--json").json
        for name in ("step_time_s", "energy_j", "average_power_w", "peak_power_w"):
            assert point[name] == plan["predicted"][name]


def test_derived_figures_follow_from_time_and_energy(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("sweep", *ON, "--gpus", "1,2,4", "--json").json
    points = content["points"]
    time_s, energy_j = ([point[name]["value"] for point in points] for name in ("step_time_s", "energy_j"))
    assert [p["speedup"] for p in points] == pytest.approx([time_s[0] / t for t in time_s])
    assert [p["efficiency"] for p in points] == pytest.approx(
        [time_s[0] / t / n for t, n in zip(time_s, (1, 2, 4), strict=True)]
    )
    assert points[0]["marginal_j_per_s"] is None
    for (t0, e0), (t1, e1), point in zip(
        *zip(*itertools.pairwise(zip(time_s, energy_j, strict=True)), strict=True), points[1:], strict=True
    ):
        expected = (e1 - e0) / (t0 - t1) if t0 > t1 else None
        assert point["marginal_j_per_s"] == (None if expected is None else pytest.approx(expected))
    assert content["least_at"]["energy"] == (1, 2, 4)[energy_j.index(min(energy_j))]
    assert content["least_at"]["time"] == (1, 2, 4)[time_s.index(min(time_s))]


def test_a_number_of_gpus_without_a_plan_is_told_apart(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("sweep", *ON, "--gpus", "1,2", "--memory", "300MiB", "--json").json
    assert [entry["num_gpus"] for entry in content["infeasible"]] == [1]
    assert [point["num_gpus"] for point in content["points"]] == [2]
    text = cli("sweep", *ON, "--gpus", "1,2", "--memory", "300MiB").out
    assert "no plan" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("text", ["", "0", "1,,2", "two", "1,-2", "1.5", ",".join(map(str, range(1, 70)))])
def test_counts_are_checked(text: str) -> None:
    with pytest.raises(InputError, match="--gpus"):
        parse_counts(text)


def pretended_run(plan: Plan, **_: Any) -> RunReport:
    """A run that took twice as long as predicted; the processor's counter was read on one process alone."""
    count = plan.decisions.num_gpus
    if count == 4:
        raise WorkerError("rank 3 was killed by SIGKILL\n  more")
    seconds = 2 * plan.predicted.step_time_s.value
    label = "measured" if count == 1 else "modelled"
    energy = Quantity(30.0 * seconds, "J", label, 29.0 * seconds, 31.0 * seconds)
    time = Quantity(seconds, "s", "measured", seconds * 0.9, seconds * 1.1)
    notes = ("energy covers: package",) if count == 1 else ("no counter can be read",)
    return RunReport(count, (2.0, 1.0, 0.5), time, RunEnergy(energy, {"CPUs": energy}, notes), (), Held({}, {}))


ON_CPU = ("model.py", "--gpus", "1,2,4,8", "--measure", "--measure-most", "4", "--profile", "none")


@pytest.fixture
def _pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.planner.sweep.detect_gpus", lambda: ())
    monkeypatch.setattr("autopar.planner.sweep.run_plan", pretended_run)


@pytest.mark.usefixtures("_pretending")
def test_measured_figures_stand_beside_predicted_ones_with_their_labels(cli: Cli) -> None:
    content = cli("sweep", *ON_CPU, "--json").json
    by_count = {point["num_gpus"]: point for point in content["points"]}
    for count, label in ((1, "measured"), (2, "modelled")):
        point, run = by_count[count], by_count[count]["measured"]
        assert point["step_time_s"]["label"] == "modelled"
        assert run["step_time_s"]["label"] == "measured"
        assert run["step_time_s"]["value"] == pytest.approx(2 * point["step_time_s"]["value"])
        assert run["energy_j"]["label"] == run["average_power_w"]["label"] == label
        assert run["average_power_w"]["value"] == pytest.approx(30.0)
        assert (run["num_processes"], run["num_steps"]) == (count, 2)
    seconds = [by_count[count]["measured"]["step_time_s"]["value"] for count in (1, 2)]
    assert by_count[2]["measured"]["speedup"] == pytest.approx(seconds[0] / seconds[1])
    reasons = {entry["num_gpus"]: entry["reason"] for entry in content["not_measured"]}
    assert reasons == {4: "rank 3 was killed by SIGKILL", 8: "more than the 4 that are run here"}


@pytest.mark.usefixtures("_pretending")
def test_the_text_and_the_page_tell_what_was_run(cli: Cli, tmp_path: Path) -> None:
    text = cli("sweep", *ON_CPU, "--report", "sweep.html").out
    assert max(map(len, text.splitlines())) <= 80
    ran = text[text.index("Run on this machine") :]
    assert "measured" in ran
    assert "modelled" in ran
    assert "not run: more than the 4" in ran
    page = (tmp_path / "sweep.html").read_text()
    assert "Run on this machine" in page
    assert "energy covers: package" in page
    assert "<small>measured</small>" in page
    assert "<small>modelled</small>" in page


@pytest.mark.usefixtures("_pretending")
@pytest.mark.parametrize(("load", "is_told"), [(0.1, False), (1000.0, True)])
def test_a_busy_machine_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch, load: float, is_told: bool) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert ("kept this machine busy" in " ".join(cli("sweep", *ON_CPU).out.split())) == is_told


@pytest.mark.usefixtures("_pretending")
def test_what_would_take_too_long_is_not_run(cli: Cli) -> None:
    content = cli("sweep", *ON_CPU, "--measure-limit", "1us", "--json").json
    assert all(point["measured"] is None for point in content["points"])
    assert "longer than allowed" in content["not_measured"][0]["reason"]


@pytest.mark.usefixtures("_pretending")
def test_a_machine_measures_only_itself(cli: Cli) -> None:
    outcome = cli("sweep", "model.py", "--gpus", "1", "--measure", "--gpu", "h100-sxm-80gb")
    assert outcome.code == 2
    assert "--gpu cpu" in outcome.err


@pytest.mark.dist
def test_a_plan_is_really_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.planner.sweep.detect_gpus", lambda: ())
    arguments = ("--gpus", "2", "--measure", "--measure-steps", "3", "--profile", "none", "--json")
    (point,) = cli("sweep", "model.py", *arguments).json["points"]
    assert point["measured"]["num_processes"] == 2
    assert point["measured"]["step_time_s"]["label"] == "measured"
    assert point["measured"]["energy_j"]["value"] > 0
