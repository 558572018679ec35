"""Commands that set plans beside one another: estimate, diff, frontier."""

from __future__ import annotations

import builtins
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.pins import parse_pins
from autopar.errors import InputError
from autopar.ir.serialize import load_plan
from autopar.ir.solution import Pins
from autopar.report.diff import diff_json, diff_report
from autopar.report.figure import INSTALL_PLOT
from autopar.report.frontier import FIGURES
from tests.cli.helpers import MODEL, Cli
from tests.planner.plans import tiny_plan

ON = ("model.py", "--gpus", "4", "--gpu", "h100-sxm-80gb")
WIDE = ("wide.py", *ON[1:], "--set", "width=4096", "--set", "batch=4096")
WIDE_MODEL = MODEL.replace("Linear(4, width)", "Linear(4, width), torch.nn.Linear(width, width)")


def test_an_estimate_prices_as_a_plan_does_and_writes_nothing(cli: Cli) -> None:
    before = set(cli.directory.iterdir())
    content = cli("estimate", *ON, "--pin", "dp=2,tp=2", "--json").json
    assert {p.name for p in cli.directory.iterdir()} - {p.name for p in before} <= {"cache"}
    planned = cli("plan", *ON, "--pin", "dp=2,tp=2", "--json").json
    assert content["predicted"] == planned["predicted"]
    assert content["num_gpus"] == 4
    free = cli("plan", *ON, "--json").json
    assert content["free"]["predicted"] == free["predicted"]


def test_an_estimate_prints_the_figures_of_both(cli: Cli) -> None:
    outcome = cli("estimate", *ON, "--pin", "dp=2,tp=2")
    assert outcome.code == 0
    assert "Free plan" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_a_plan_does_not_differ_from_itself() -> None:
    plan = tiny_plan()
    found = diff_json(plan, plan)
    assert (found["settings"], found["ops"], found["parameters"]) == ({}, [], [])
    assert "decide the same" in diff_report(plan, plan, ("a.json", "b.json"))


def test_a_diff_names_ops_settings_and_figures(cli: Cli) -> None:
    cli("plan", *ON, "--out", "a.json")
    cli("plan", *ON, "--out", "b.json", "--pin", "dp=4,tp=1", "--deadline", "1s")
    outcome = cli("diff", "a.json", "b.json")
    assert all(word in outcome.out for word in ("linear", "whole -> dp dim0", "step time", "deadline 1 s"))
    assert max(map(len, outcome.out.splitlines())) <= 80
    content = cli("diff", "a.json", "b.json", "--json").json
    ops = load_plan("a.json").decisions.ops
    assert 0 < sum(change["count"] for change in content["ops"]) <= len(ops)


def _figure(point: Mapping[str, Any], name: str) -> float:
    quantity = point[name]
    assert set(quantity) == {"value", "unit", "label", "low", "high"}
    return float(quantity["value"])


def test_a_frontier_rises_in_time_and_falls_in_energy(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("frontier", *WIDE, "--points", "6", "--out-dir", "plans", "--json").json
    points = content["points"]
    assert len(points) > 1
    pairs = itertools.pairwise(points)
    assert all(_figure(a, "step_time_s") < _figure(b, "step_time_s") for a, b in pairs)
    assert all(_figure(a, "energy_j") > _figure(b, "energy_j") for a, b in pairs)
    assert set(points[0]) == {*FIGURES, "num_gpus", "description", "gap"}
    plans = [load_plan(path) for path in sorted(Path("plans").glob("plan_*.json"))]
    assert [plan.predicted.energy_j.value for plan in plans] == [_figure(point, "energy_j") for point in points]
    best = cli("plan", *WIDE, "--json").json["predicted"]["step_time_s"]["value"]
    assert _figure(points[0], "step_time_s") == pytest.approx(best, rel=2e-3)


def test_a_frontier_fits_into_80_columns(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    outcome = cli("frontier", *WIDE, "--points", "4")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_without_matplotlib_a_plot_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, scope: Any = None, own: Any = None, names: Sequence[str] = (), level: int = 0) -> Any:
        if name.split(".", maxsplit=1)[0] == "matplotlib":
            raise ImportError(name)
        return real(name, scope, own, names, level)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    outcome = cli("frontier", *ON, "--plot", "f.svg")
    assert (outcome.code, outcome.out) == (2, "")
    assert INSTALL_PLOT in outcome.err


CONSTRAINTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "op:.*mlp.*=columns": ((".*mlp.*", "columns"),),
    "op:a=b, op:c==d": (("a", "b"), ("c=", "d")),
}


@pytest.mark.parametrize("text", CONSTRAINTS)
def test_constraints_in_words(text: str) -> None:
    assert parse_pins(text).pins == Pins(ops=CONSTRAINTS[text])


def test_context_and_experts_can_be_switched_off() -> None:
    assert parse_pins("context=off,experts=off").pins == Pins(without=("context", "exchange", "experts"))
    with pytest.raises(InputError, match="expected context=off"):
        parse_pins("context=on")


def test_constrained_ops_take_their_label(cli: Cli) -> None:
    assert cli("plan", *ON, "--use-all", "--pin", "op:linear.*=columns").code == 0
    decisions = load_plan("plan.json").decisions
    axes = [i for i, axis in enumerate(decisions.mesh.axes) if axis.size > 1]
    labels = {decisions.ops[name][i].label for name in decisions.ops if name.startswith("linear") for i in axes}
    assert labels == {"columns"}


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        ("op:nosuch=columns", "matches no op"),
        ("op:linear=rows", "columns"),
        ("op:(=columns", "no regular expression"),
        ("op:=columns", "expected op:REGEX=LABEL"),
        ("op:linear", "expected op:REGEX=LABEL"),
    ],
)
def test_bad_constraints_are_bad_input(pin: str, says: str, cli: Cli) -> None:
    outcome = cli("plan", *ON, "--pin", pin)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("estimate", *ON), "--pin"),
        (("frontier", *ON, "--points", "0"), "at least 1"),
        (("frontier", *ON, "--out-dir", "model.py"), "--out-dir"),
        (("frontier", *ON, "--point", "3"), "--points"),
        (("diff", "nosuch.json", "model.py"), "nosuch.json"),
        (("estimate", *ON, "--pin", "dp=2", "--out", "x"), "--out"),
    ],
)
def test_bad_input_is_one_message(arguments: tuple[str, ...], says: str, cli: Cli) -> None:
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err
