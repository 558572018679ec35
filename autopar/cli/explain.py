"""`autopar explain`: why this plan, and what an alternative would cost."""

from __future__ import annotations

import json

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import cache_option, json_option
from autopar.cli.page import check_report, report_option
from autopar.cli.pins import Pinned, parse_pins
from autopar.errors import AutoparError, InputError
from autopar.ir.plan import Plan
from autopar.ir.savings import Savings
from autopar.ir.serialize import check_writable, load_plan, write_atomic
from autopar.ir.solution import Pins
from autopar.planner.rival import make_rival
from autopar.planner.savings import split_savings
from autopar.planner.timeline import make_detail
from autopar.report.explain import explain_json, explain_report
from autopar.report.explain_savings import savings_json
from autopar.report.page import plan_page
from autopar.report.trace import trace_json


@click.command()
@click.argument("plan_file")
@click.option("--why-not", "pin_text", metavar="KEY=VALUE,...", help="Compare with the best plan under these pins.")
@click.option("--trace", metavar="FILE", help="Write the simulated step there, for Perfetto or chrome://tracing.")
@click.option(
    "--savings", is_flag=True, help="Split the energy saved against the plan of least time: split, GPUs, clocks."
)
@click.option("--pin", "made_under", metavar="KEY=VALUE,...", help="With --savings: the pins that PLAN was made under.")
@report_option
@cache_option
@json_option
def explain(
    plan_file: str,
    pin_text: str | None,
    trace: str | None,
    *,
    savings: bool,
    made_under: str | None,
    report: str | None,
    use_cache: bool,
    as_json: bool,
) -> None:
    """Say where time, energy and memory of PLAN_FILE go, and why its rivals lost."""
    if made_under is not None and not savings:
        raise InputError("--pin says what a plan was made under for --savings; --why-not compares with other pins")
    plan = load_plan(plan_file)
    check_report(report, plan_file, trace)
    if trace is not None:
        check_writable(trace, "--trace")
    split = None
    if savings:
        pins = None if made_under is None else _rival_pins(made_under, plan.model.batch_size, "--pin")
        with progress_line(as_json) as progress:
            split = split_savings(plan, pins, use_cache=use_cache, progress=progress)
    _write_simulated(plan, trace, report, as_json, split)
    rival = None
    if pin_text is not None:
        pins = _rival_pins(pin_text, plan.model.batch_size, "--why-not")
        with progress_line(as_json) as progress:
            rival = make_rival(plan, pins, progress)
    if as_json:
        print_json(explain_json(plan, rival) | ({} if split is None else {"savings": savings_json(split)}))
    else:
        click.echo(explain_report(plan, rival, pin_text or "", split))


def _rival_pins(text: str, batch_size: int, option: str) -> Pins:
    pinned = parse_pins(text, batch_size)
    if pinned != Pinned(pinned.pins, batch_size):
        raise InputError(
            f"{option}: the rival runs the plan's model on the plan's software; fix neither dtype nor those"
        )
    return pinned.pins


def _write_simulated(plan: Plan, trace: str | None, report: str | None, as_json: bool, savings: Savings | None) -> None:
    """The files that show the simulated step. A page does without it where the model is no longer to be had."""
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
        write_atomic(report, plan_page(plan, detail, missing, savings))
