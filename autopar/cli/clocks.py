"""`autopar clocks`: the clock of every instruction of a pipeline."""

from __future__ import annotations

import json
import re

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option
from autopar.cli.quantities import parse_seconds
from autopar.errors import InputError
from autopar.ir.inference import require_training
from autopar.ir.serialize import check_writable, load_plan, write_atomic
from autopar.planner.clock_file import schedule_json
from autopar.planner.clocks import Straggler, plan_instruction_clocks
from autopar.report.clocks import clocks_report


@click.command()
@click.argument("plan_file")
@click.option("--deadline", metavar="TIME", help="Latest end of a step, e.g. 1.2s; default: that of the plan.")
@click.option(
    "--straggler",
    metavar="TIME|FACTOR[@RANK]",
    help="When a straggler lets the step end: 1.5s, or 1.2x the plan's step; 1.2x@0: pipeline rank 0 is as slow.",
)
@click.option("--out", metavar="FILE", help="Write clocks and figures there, as JSON.")
@json_option
def clocks(plan_file: str, deadline: str | None, straggler: str | None, out: str | None, as_json: bool) -> None:
    """Choose the clock of every forward and backward of PLAN_FILE: least energy within a deadline."""
    plan = load_plan(plan_file)
    require_training(plan, "autopar clocks")
    deadline_s = None if deadline is None else _seconds("--deadline", deadline)
    late = _straggler(straggler)
    if out is not None:
        check_writable(out)
    with progress_line(as_json) as progress:
        found = plan_instruction_clocks(plan, deadline_s=deadline_s, straggler=late, progress=progress)
    content = schedule_json(plan, found)
    if out is not None:
        write_atomic(out, json.dumps(content, indent=1) + "\n")
    print_json(content) if as_json else click.echo(clocks_report(found))


def _straggler(text: str | None) -> Straggler:
    """`1.5s`, `1.2x` or `1.2x@3`. Raises InputError."""
    if text is None:
        return Straggler()
    found = re.fullmatch(r"([0-9.]+)x(?:@(\d+))?", text)
    try:
        if found is None:
            return Straggler(step_s=parse_seconds(text))
        return Straggler(ratio=float(found[1]), rank=None if found[2] is None else int(found[2]))
    except (InputError, ValueError) as error:
        expected = "expected a time such as 1.5s, a factor such as 1.2x, or one of a pipeline rank such as 1.2x@0"
        raise InputError(f"--straggler {text}: {expected}: {error}") from error


def _seconds(option: str, text: str) -> float:
    try:
        return parse_seconds(text)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
