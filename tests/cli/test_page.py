"""`--report FILE` of the commands that have it: what is written, what is said, what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.ir.serialize import load_plan
from tests.cli.helpers import Cli
from tests.cli.test_cache import SECOND_RUN
from tests.report.pages import Read, read
from tests.report.test_page import check_figures

PLAN = ("plan", "model.py", "--gpus", "2", "--gpu", "l4")
DRAWN = "Memory over the step"


def page(name: str) -> Read:
    return read(Path(name).read_text(encoding="utf-8"))


def test_plan_writes_a_page_of_the_plan_it_writes(cli: Cli) -> None:
    outcome = cli(*PLAN, "--pin", "pp=2,dp=1,tp=1,m=4", "--report", "plan.html")
    assert outcome.code == 0
    assert re.search(r"^Page +plan\.html$", outcome.out, re.MULTILINE)
    found = page("plan.html")
    check_figures(load_plan("plan.json"), found.text)
    assert DRAWN in found.text
    assert "At the prices of now" not in found.text
    assert cli(*PLAN, "--json", "--report", "plan.html").json == json.loads(Path("plan.json").read_text())


def test_the_page_of_a_recalled_plan_is_the_same_and_needs_no_torch(cli: Cli) -> None:
    cli(*PLAN, "--report", "first.html")
    assert "Cache" in cli(*PLAN, "--report", "second.html").out
    assert Path("first.html").read_bytes() == Path("second.html").read_bytes()
    script = SECOND_RUN.format(arguments=[*PLAN, "--report", "third.html"])
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("first.html").read_bytes() == Path("third.html").read_bytes()


def test_the_page_shows_the_prices_of_the_plan(cli: Cli) -> None:
    """A profile that the plan was not made with stays out of its page."""
    cli(*PLAN, "--profile", "none", "--no-cache", "--report", "plan.html")
    assert "At the prices of now" not in page("plan.html").text


def test_explain_writes_the_same_page(cli: Cli) -> None:
    cli(*PLAN, "--report", "plan.html")
    assert cli("explain", "plan.json", "--report", "again.html", "--json").code == 0
    assert Path("plan.html").read_bytes() == Path("again.html").read_bytes()


def test_without_its_model_the_plan_still_has_a_page(cli: Cli) -> None:
    cli(*PLAN)
    (cli.directory / "model.py").unlink()
    assert cli("explain", "plan.json", "--report", "plan.html").code == 0
    found = page("plan.html")
    check_figures(load_plan("plan.json"), found.text)
    assert DRAWN not in found.text
    assert "Not drawn: " in found.text
    assert cli("explain", "plan.json", "--report", "plan.html", "--trace", "trace.json").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (*PLAN, "--report", "nowhere/plan.html"),
        (*PLAN, "--report", "."),
        (*PLAN, "--report", "plan.json"),
        (*PLAN, "--out", "plan.html", "--report", "./plan.html"),
        ("frontier", *PLAN[1:], "--report", "nowhere/f.html"),
        ("sweep", "model.py", "--gpu", "l4", "--gpus", "1,2", "--report", "nowhere/s.html"),
    ],
)
def test_a_page_that_has_no_place_is_refused_before_any_work(arguments: tuple[str, ...], cli: Cli) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "--report" in outcome.err
    assert not list(cli.directory.glob("*.json"))
    assert not list(cli.directory.glob("*.html"))


def test_explain_does_not_write_over_the_plan(cli: Cli) -> None:
    cli(*PLAN)
    before = Path("plan.json").read_bytes()
    assert cli("explain", "plan.json", "--report", "plan.json").code == 2
    assert Path("plan.json").read_bytes() == before


def test_frontier_and_sweep_write_pages(cli: Cli) -> None:
    cli("frontier", *PLAN[1:], "--points", "3", "--report", "frontier.html")
    found = page("frontier.html")
    assert found.all("circle")
    assert "Time-energy frontier of model.py on up to 2 GPUs" in found.text
    cli("sweep", "model.py", "--gpu", "l4", "--gpus", "1,2,3", "--report", "sweep.html")
    found = page("sweep.html")
    assert "Least energy" in found.text
    assert len(found.all("circle")) >= 4
