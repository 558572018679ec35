"""`autopar run` and `autopar verify`: execute a plan; compare it with the serial model.

Under torchrun every process runs the command and the first one speaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

import click

from autopar.cli.boards import board_options
from autopar.cli.console import print_json
from autopar.cli.hosts import host_options, hosts_of
from autopar.cli.options import json_option
from autopar.cli.training import training_options
from autopar.errors import InputError
from autopar.ir.inference import is_inference
from autopar.ir.plan import Plan, Prediction
from autopar.ir.run import RunSettings
from autopar.ir.serialize import load_plan, quantity_json
from autopar.planner.execute import verify_plan
from autopar.planner.infer import InferenceRun, run_inference, verify_inference
from autopar.planner.recover import Policy, Survived, run_surviving
from autopar.planner.settings import BoardSettings
from autopar.units import format_joules, format_seconds


@click.command()
@click.argument("plan_file")
@training_options
@board_options
@host_options
@json_option
def run(
    plan_file: str, *, training: RunSettings, policy: Policy, boards: BoardSettings, as_json: bool, **meeting: Any
) -> None:
    """Execute PLAN_FILE: starts the processes of this host, or joins those of torchrun.

    Over several hosts, run the same command on each, with its own --node-rank. A plan for inference runs forward
    passes.
    """
    plan = load_plan(plan_file)
    hosts = hosts_of(**meeting)
    if is_inference(plan):
        if policy != Policy():
            raise InputError("--max-failures is for runs that train: forward passes are not taken up again")
        with _speaker(as_json) as say:
            passes = run_inference(plan, training, boards=boards, hosts=hosts, progress=say)
        _answer(_passes_json(plan, passes) if as_json else _passes_text(plan, passes), as_json)
        return
    with _speaker(as_json) as say:
        survived = run_surviving(plan, training, policy=policy, hosts=hosts, boards=boards, progress=say)
    _answer(_run_json(plan, survived) if as_json else _run_text(plan, survived), as_json)


@click.command()
@click.argument("plan_file")
@host_options
@json_option
def verify(plan_file: str, *, as_json: bool, **meeting: Any) -> None:
    """Run PLAN_FILE beside the serial model: loss and every gradient, or for inference every output, must agree.

    Over several hosts, run the same command on each, with its own --node-rank.
    """
    plan = load_plan(plan_file)
    hosts = hosts_of(**meeting)
    with _speaker(as_json) as say:
        check = verify_inference if is_inference(plan) else verify_plan
        report = check(plan, hosts=hosts, progress=say)
    _answer(asdict(report) if as_json else str(report), as_json)


@contextmanager
def _speaker(as_json: bool) -> Iterator[Callable[[str], None] | None]:
    """Where the lines of the workers go: to stderr, so that stdout holds the result alone."""
    with redirect_stdout(sys.stderr):
        yield None if as_json else lambda line: click.echo(line, err=True)


def _answer(content: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    print_json(content) if as_json else click.echo(content)


def _run_json(plan: Plan, survived: Survived) -> dict[str, Any]:
    report, predicted = survived.report, survived.plan.predicted
    return {
        "first_step": report.first_step,
        "restarts": [asdict(restart) for restart in survived.restarts],
        "num_processes": report.num_processes,
        "losses": list(report.losses),
        "step_time_s": quantity_json(report.step_time),
        "energy_j": quantity_json(report.energy.total),
        "energy_parts": {name: quantity_json(part) for name, part in report.energy.parts.items()},
        "boards": asdict(report.held),
        "predicted": _predicted_json(plan, predicted),
        "notes": [*report.notes, *report.energy.notes],
    }


def _passes_json(plan: Plan, passes: InferenceRun) -> dict[str, Any]:
    rates = (("samples_per_s", passes.samples_per_s), ("tokens_per_s", passes.tokens_per_s))
    return {
        "num_processes": passes.num_processes,
        "num_passes": passes.num_passes,
        "latency_s": quantity_json(passes.latency),
        **{name: quantity_json(rate) for name, rate in rates if rate is not None},
        "energy_j": quantity_json(passes.energy.total),
        "energy_parts": {name: quantity_json(part) for name, part in passes.energy.parts.items()},
        "boards": asdict(passes.held),
        "predicted": _predicted_json(plan, plan.predicted),
        "notes": list(passes.energy.notes),
    }


def _passes_text(plan: Plan, passes: InferenceRun) -> str:
    return f"{passes}\n{_predicted_text(plan, plan.predicted, 'batch')}"


def _predicted_json(plan: Plan, predicted: Prediction) -> dict[str, Any]:
    return {
        "gpu": plan.cluster.gpu,
        "step_time_s": quantity_json(predicted.step_time_s),
        "energy_j": quantity_json(predicted.energy_j),
    }


def _run_text(plan: Plan, survived: Survived) -> str:
    return f"{survived}\n{_predicted_text(plan, survived.plan.predicted, 'step')}"


def _predicted_text(plan: Plan, predicted: Prediction, unit: str) -> str:
    time, energy = format_seconds(predicted.step_time_s.value), format_joules(predicted.energy_j.value)
    return f"  predicted  {time} and {energy} per {unit} on {plan.cluster.gpu} ({predicted.energy_j.label})"
