"""What others depend on: public names, options, error classes, and that importing autopar costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import autopar
from autopar import errors
from autopar.cli.app import autopar as command_group
from autopar.version import __version__

ROOT = Path(__file__).resolve().parent.parent

NAMES = [
    "AutoparError",
    "InfeasibleError",
    "Plan",
    "__version__",
    "autoparallel",
    "load_plan",
    "parallelize",
    "plan",
    "save_plan",
]

PLANNING = {"--batch", "--energy-weight", "--gap", "--gpu", "--gpus", "--gpus-per-node", "--memory", "--objective"}
PLANNING |= {"--deadline", "--energy-budget", "--energy-price", "--gpu-hour-price", "--peak-power", "--power-cap"}
PLANNING |= {"--embodied-carbon", "--gpu-price", "--grid-carbon", "--lifetime", "--pue", "--steps", "--tariff"}
PLANNING |= {"--utilisation", "--window"}
PLANNING |= {"--clocks", "--cluster", "--network", "--pin", "--profile", "--time-limit", "--time-weight", "--use-all"}
PLANNING |= {"--gpu-power-limit", "--mode", "--precision"}
OBJECTIVE = {"--energy-price", "--energy-weight", "--gap", "--gpu-hour-price", "--objective", "--time-weight"}
OBJECTIVE |= {"--embodied-carbon", "--gpu-price", "--grid-carbon", "--lifetime", "--pue", "--steps", "--tariff"}
OBJECTIVE |= {"--utilisation", "--window"}
HOSTS = {"--master-addr", "--master-port", "--node-rank", "--nodes", "--timeout"}
OPTIONS = {
    "plan": PLANNING | {"--json", "--no-cache", "--out", "--report", "--set"},
    "run": {"--clip-norm", "--clock-schedule", "--clock-switch-time"}
    | {"--compile", "--json", "--lock-clocks", "--set-power-limit", "--steps"}
    | {
        "--adapt",
        "--async-checkpoints",
        "--checkpoint",
        "--checkpoint-every",
        "--data-seed",
        "--data-workers",
        "--keep",
        "--offload-dir",
    }
    | {"--max-failures"}
    | HOSTS,
    "checkpoint": set(),
    "meter": {"--json", "--seconds", "--zeus"},
    "unlock": {"--force", "--json"},
    "verify": {"--json"} | HOSTS,
    "export": {"--account", "--checkpoint", "--checkpoint-every", "--claim", "--directory", "--env", "--image"}
    | {"--json", "--master-port", "--name", "--nodes", "--out"}
    | {"--partition", "--steps", "--time", "--timeout", "--to"},
    "explain": {"--json", "--no-cache", "--pin", "--report", "--savings", "--trace", "--why-not"},
    "estimate": PLANNING | {"--json", "--set"},
    "frontier": PLANNING - OBJECTIVE | {"--json", "--out-dir", "--plot", "--points", "--report", "--set"},
    "diff": {"--json"},
    "gpus": {"--json"},
    "profile": {"--batch", "--device", "--json", "--lock-clocks", "--out", "--processes", "--quick", "--set"},
    "study": {"--batch", "--gpu", "--gpus-per-node", "--json", "--measure", "--measure-most", "--measure-steps"}
    | {"--network", "--plot", "--policies", "--profile", "--rate", "--set", "--workers"},
    "sweep": PLANNING - {"--cluster", "--use-all"}
    | {"--json", "--measure", "--measure-limit", "--measure-most", "--measure-steps", "--plot", "--report", "--set"},
    "clocks": {"--deadline", "--json", "--out", "--straggler"},
    "replan": {"--clocks", "--compute", "--deadline", "--energy-budget", "--gpu-hour-price", "--gpus", "--grid-carbon"}
    | {"--json", "--objective", "--out", "--peak-power", "--pin", "--power-cap", "--price", "--profile", "--pue"}
    | {"--store", "--unpin"},
    "validate": {"--free", "--jobs", "--json", "--plot"},
}


def test_public_names_are_these_and_sorted() -> None:
    assert autopar.__all__ == NAMES == sorted(NAMES)
    assert all(getattr(autopar, name) is not None for name in NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        autopar.nonsense  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_each_command(command: str) -> None:
    parameters = command_group.commands[command].params
    found = {name for p in parameters if isinstance(p, click.Option) for name in p.opts}
    assert found == OPTIONS[command]


def test_commands_are_these() -> None:
    assert set(command_group.commands) == set(OPTIONS)


@pytest.mark.parametrize(
    "module",
    ["autopar", "autopar.api", "autopar.cli", "autopar.planner.plan", "autopar.report.explain", "autopar.cost.table"],
)
def test_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_error_stands_in_the_tree_of_its_module() -> None:
    classes = {name for name, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)}
    assert errors.__doc__ is not None
    assert {name for name in classes if f"{name} " not in errors.__doc__} == set()


def test_version_and_changelog_agree() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
