"""Bad input: one clear message, the right exit code, no traceback, nothing written, nothing left running."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.helpers import MODEL, Cli

BRANCHING = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 0:  # the line to name
            y = y * 2
        return y.mean()

def build_model():
    return Net()

def example_batch():
    return torch.zeros(8, 4)
"""


@dataclass(frozen=True)
class Case:
    """A command line, the file it needs, and what must come out."""

    arguments: tuple[str, ...]
    says: str
    code: int = 2
    model: str | None = None


def _plan(*arguments: str, model: str = "model.py") -> tuple[str, ...]:
    return ("plan", model, "--gpu", "h100-sxm-80gb", *arguments)


CASES = {
    "missing file": Case(_plan("--gpus", "2", model="nosuch.py"), "nosuch.py"),
    "directory": Case(_plan("--gpus", "2", model="."), "directory"),
    "not Python": Case(_plan("--gpus", "2"), "not a Python file", model="this is no Python\n"),
    "binary": Case(_plan("--gpus", "2"), "not a Python file", model="\x00\x01"),
    "raises at import": Case(_plan("--gpus", "2"), "boom", model="raise RuntimeError('boom')\n"),
    "no model": Case(_plan("--gpus", "2"), "build_model", model="import torch\n"),
    "no batch": Case(_plan("--gpus", "2"), "example_batch", model=MODEL.replace("example_batch", "other")),
    "model is no module": Case(
        _plan("--gpus", "2"), "nn.Module", model=MODEL.replace("return torch.nn.Seq", "return 1 #")
    ),
    "build raises": Case(
        _plan("--gpus", "2"), "model.py", model=MODEL.replace("Linear(4, width)", "Linear('x', width)")
    ),
    "control flow": Case(_plan("--gpus", "2"), "if y.sum() > 0", model=BRANCHING),
    "batch does not fit": Case(
        _plan("--gpus", "2"), "model.py", model=MODEL.replace("zeros(batch, 4)", "zeros(batch, 5)")
    ),
    "batch not divisible": Case(_plan("--gpus", "4", "--pin", "dp=3"), "does not divide"),
    "microbatches not divisible": Case(_plan("--gpus", "2", "--pin", "m=3"), "3 microbatches"),
    "unknown GPU": Case(("plan", "model.py", "--gpus", "2", "--gpu", "h100"), "h100-sxm-80gb"),
    "unknown option of the model": Case(_plan("--gpus", "2", "--set", "depth=3"), "depth"),
    "bad option of the model": Case(_plan("--gpus", "2", "--set", "width=wide"), "width"),
    "setting without value": Case(_plan("--gpus", "2", "--set", "width"), "KEY=VALUE"),
    "zero GPUs": Case(_plan("--gpus", "0"), "at least 1"),
    "negative GPUs": Case(_plan("--gpus", "-1"), "at least 1"),
    "many GPUs": Case(_plan("--gpus", "many"), "many"),
    "zero batch": Case(_plan("--gpus", "2", "--batch", "0"), "at least 1"),
    "no GPUs per node": Case(_plan("--gpus", "2", "--gpus-per-node", "0"), "at least 1"),
    "unknown objective": Case(_plan("--gpus", "2", "--objective", "speed"), "energy"),
    "weight without its objective": Case(_plan("--gpus", "2", "--energy-weight", "2"), "--objective weighted"),
    "limit that no board takes": Case(
        _plan("--gpus", "2", "--gpu", "h100-sxm-80gb", "--gpu-power-limit", "150W"), "from 200 W"
    ),
    "bad weight": Case(_plan("--gpus", "2", "--objective", "weighted", "--time-weight", "nan"), "weight"),
    "bad memory": Case(_plan("--gpus", "2", "--memory", "lots"), "46GiB"),
    "bad time": Case(_plan("--gpus", "2", "--time-limit", "soon"), "30s"),
    "bad deadline": Case(_plan("--gpus", "2", "--deadline", "soon"), "--deadline"),
    "bad energy budget": Case(_plan("--gpus", "2", "--energy-budget", "1kj"), "--energy-budget"),
    "bad power cap": Case(_plan("--gpus", "2", "--power-cap", "0W"), "--power-cap"),
    "bad peak power": Case(_plan("--gpus", "2", "--peak-power", "40kJ"), "--peak-power"),
    "typo in deadline": Case(_plan("--gpus", "2", "--dedline", "1s"), "--deadline"),
    "typo in energy budget": Case(_plan("--gpus", "2", "--energy-buget", "1J"), "--energy-budget"),
    "typo in power cap": Case(_plan("--gpus", "2", "--powercap", "1W"), "--power-cap"),
    "typo in peak power": Case(_plan("--gpus", "2", "--peakpower", "1W"), "--peak-power"),
    "cost without prices": Case(_plan("--gpus", "2", "--objective", "cost"), "--gpu-hour-price"),
    "cost without a price": Case(_plan("--gpus", "2", "--objective", "cost", "--energy-price", "1"), "--gpu-hour"),
    "negative price": Case(
        _plan("--gpus", "2", "--objective", "cost", "--energy-price", "1", "--gpu-hour-price", "-1"), "at least 0"
    ),
    "price without cost": Case(_plan("--gpus", "2", "--energy-price", "1"), "--objective cost"),
    "bad gap": Case(_plan("--gpus", "2", "--gap", "2"), "--gap"),
    "unknown pin": Case(_plan("--gpus", "2", "--pin", "qp=2"), "dp, tp, pp"),
    "bad pin": Case(_plan("--gpus", "2", "--pin", "dp=two"), "whole number"),
    "pins need more GPUs": Case(_plan("--gpus", "2", "--pin", "dp=4"), "4"),
    "too large": Case(_plan("--gpus", "2", "--memory", "64"), "memory", 3),
    "unwritable directory": Case(_plan("--gpus", "2", "--out", "no/such/plan.json"), "cannot write"),
    "output is a directory": Case(_plan("--gpus", "2", "--out", "."), "directory"),
    "typo in a flag": Case(_plan("--gpuss", "2"), "--gpus"),
    "typo in a command": Case(("paln", "model.py"), "plan"),
    "no plan file": Case(("run", "nosuch.json"), "nosuch.json"),
    "plan file is no plan": Case(("verify", "model.py"), "JSON"),
    "no steps": Case(("run", "plan.json", "--steps", "0"), "at least 1"),
    "no norm": Case(("run", "plan.json", "--clip-norm", "0"), "positive number"),
    "missing profile": Case(_plan("--gpus", "2", "--profile", "nosuch.jsonl"), "nosuch.jsonl"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_writes_nothing(name: str, cli: Cli) -> None:
    case = CASES[name]
    if case.model is not None:
        cli.write("model.py", case.model)
    before = _files(cli.directory)
    outcome = cli(*case.arguments)
    assert outcome.code == case.code, outcome.err
    assert case.says in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert _files(cli.directory) == before


@pytest.mark.parametrize("name", ["missing file", "zero GPUs", "typo in a flag", "too large", "no plan file"])
def test_with_json_the_error_is_json_on_stdout(name: str, cli: Cli) -> None:
    case = CASES[name]
    outcome = cli(*case.arguments, "--json")
    assert outcome.err == ""
    error = outcome.json["error"]
    assert error["exit_code"] == outcome.code == case.code
    assert case.says in error["message"]
    assert error["kind"]


def test_infeasible_says_what_is_needed_what_is_there_and_ways_out(cli: Cli) -> None:
    outcome = cli(*CASES["too large"].arguments)
    assert all(word in outcome.err for word in ("need", "have", "1)"))


def test_the_users_line_is_named(cli: Cli) -> None:
    cli.write("model.py", BRANCHING)
    line = BRANCHING.splitlines().index("        if y.sum() > 0:  # the line to name") + 1
    assert f"model.py:{line}" in cli(*CASES["control flow"].arguments).err


def _files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if "__pycache__" not in str(p)}


@pytest.fixture
def planned(cli: Cli) -> Cli:
    assert cli(*_plan("--gpus", "2")).code == 0
    return cli


def _damage(cli: Cli, how: str) -> None:
    path = cli.directory / "plan.json"
    text = path.read_text()
    content = json.loads(text)
    if how == "truncated":
        path.write_text(text[: len(text) // 2])
        return
    if how == "newer":
        content["schema_version"] += 1
    if how == "nonsense":
        content["decisions"]["num_microbatches"] = -4
    if how == "other sharding":
        name = next(iter(content["decisions"]["ops"]))
        content["decisions"]["ops"][name] = content["decisions"]["ops"][name].replace(" -> ", " -> S7;")
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("command", ["run", "verify", "explain"])
@pytest.mark.parametrize("how", ["truncated", "newer", "nonsense", "other sharding"])
def test_a_damaged_plan_is_refused(command: str, how: str, planned: Cli) -> None:
    _damage(planned, how)
    outcome = planned(command, "plan.json")
    assert outcome.code == 2, outcome.err
    assert "plan.json" in outcome.err


@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_plan_for_another_model_is_refused(command: str, planned: Cli) -> None:
    planned.write("model.py", MODEL.replace("GELU", "ReLU"))
    outcome = planned(command, "plan.json")
    assert outcome.code == 2, outcome.err
    assert "model" in outcome.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_plan_file_is_kept(cli: Cli) -> None:
    path = cli.directory / "plan.json"
    path.write_text("mine")
    path.chmod(0o400)
    assert cli(*_plan("--gpus", "2")).code == 2
    assert path.read_text() == "mine"
