"""`autopar explain`: why this plan, and what an alternative would cost."""

from __future__ import annotations

import json

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option
from autopar.cli.page import check_report, report_option
from autopar.cli.pins import Pinned, parse_pins
from autopar.errors import AutoparError, InputError
from autopar.ir.plan import Plan
from autopar.ir.serialize import check_writable, load_plan, write_atomic
from autopar.ir.solution import Pins
from autopar.planner.rival import make_rival
from autopar.planner.timeline import make_detail
from autopar.report.explain import explain_json, explain_report
from autopar.report.page import plan_page
from autopar.report.trace import trace_json


@click.command()
@click.argument("plan_file")
@click.option("--why-not", "pin_text", metavar="KEY=VALUE,...", help="Compare with the best plan under these pins.")
@click.option("--trace", metavar="FILE", help="Write the simulated step there, for Perfetto or chrome://tracing.")
@report_option
@json_option
def explain(plan_file: str, pin_text: str | None, trace: str | None, report: str | None, as_json: bool) -> None:
    """Say where time, energy and memory of PLAN_FILE go, and why its rivals lost."""
    plan = load_plan(plan_file)
    check_report(report, plan_file, trace)
    _write_simulated(plan, trace, report, as_json)
    rival = None
    if pin_text is not None:
        pins = _rival_pins(pin_text, plan.model.batch_size)
        with progress_line(as_json) as progress:
            rival = make_rival(plan, pins, progress)
    if as_json:
        print_json(explain_json(plan, rival))
    else:
        click.echo(explain_report(plan, rival, pin_text or ""))


def _rival_pins(text: str, batch_size: int) -> Pins:
    pinned = parse_pins(text, batch_size)
    if pinned != Pinned(pinned.pins, batch_size):
        raise InputError(
            "--why-not: the rival runs the plan's model on the plan's software; fix neither dtype nor those"
        )
    return pinned.pins


def _write_simulated(plan: Plan, trace: str | None, report: str | None, as_json: bool) -> None:
    """The files that show the simulated step. A page does without it where the model is no longer to be had."""
    if trace is not None:
        check_writable(trace, "--trace")
    if trace is None and report is None:
        return
    detail, missing = None, ""
    try:
        with progress_line(as_json) as progress:
            detail = make_detail(plan, progress)
    except AutoparError as error:
        if trace is not None:
            raise
        missing = str(error)
    if trace is not None and detail is not None:
        write_atomic(trace, json.dumps(trace_json(detail.timeline, detail.passes)) + "\n")
    if report is not None:
        write_atomic(report, plan_page(plan, detail, missing))
