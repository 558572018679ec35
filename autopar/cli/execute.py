"""`autopar run` and `autopar verify`: execute a plan; compare it with the serial model."""

from __future__ import annotations

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option
from autopar.errors import InputError
from autopar.ir.serialize import load_plan


@click.command()
@click.argument("plan_file")
@click.option("--steps", default=10, show_default=True, metavar="N", help="Optimizer steps.")
@json_option
def run(plan_file: str, steps: int, as_json: bool) -> int:
    """Execute PLAN_FILE: starts local processes, or joins those of torchrun."""
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    plan = load_plan(plan_file)
    from autopar.planner.execute import run_plan

    with progress_line(as_json) as progress:
        result = run_plan(plan, steps=steps, progress=progress)
    print_json(result) if as_json else click.echo(str(result))
    return 0


@click.command()
@click.argument("plan_file")
@json_option
def verify(plan_file: str, as_json: bool) -> int:
    """Run PLAN_FILE beside the serial model: loss and every gradient must agree."""
    plan = load_plan(plan_file)
    from autopar.planner.execute import verify_plan

    with progress_line(as_json) as progress:
        result = verify_plan(plan, progress=progress)
    print_json(result) if as_json else click.echo(str(result))
    return 0
