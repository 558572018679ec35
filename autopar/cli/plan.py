"""`autopar plan`: make a plan, print it, write it."""

from __future__ import annotations

import json
from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import build_request, cache_option, json_option, model_settings, request_options, set_option
from autopar.cli.page import check_report, report_option
from autopar.errors import PlanMismatchError
from autopar.ir.serialize import check_writable, parse_plan, write_atomic
from autopar.planner.recall import Command, Finished, finished_plan, graph_of
from autopar.planner.request import Progress
from autopar.planner.timeline import make_detail
from autopar.report.page import plan_page
from autopar.report.text import closing_hints, wrapped


@click.command()
@click.argument("model")
@request_options
@set_option
@click.option("--out", default="plan.json", show_default=True, metavar="FILE", help="Where to write the plan.")
@report_option
@cache_option
@json_option
def plan(
    model: str,
    *,
    settings: tuple[str, ...],
    out: str,
    report: str | None,
    as_json: bool,
    use_cache: bool,
    **options: Any,
) -> None:
    """Plan MODEL (a Python file, or hf:config.json) and write the plan file."""
    command = Command(model, model_settings(model, settings, options), build_request(options), use_cache)
    check_writable(out)
    check_report(report, out)
    with progress_line(as_json) as progress:
        finished = finished_plan(command, progress)
        write_atomic(out, finished.plan_text)
        if report is not None:
            write_atomic(report, _page(command, finished, progress))
    if as_json:
        print_json(json.loads(finished.plan_text))
        return
    told = wrapped("Cache", "made before from the same inputs; --no-cache plans anew") if finished.is_recalled else []
    told += wrapped("Page", report) if report is not None else []
    click.echo("\n".join([finished.report, *told, *closing_hints(out)]))


def _page(command: Command, finished: Finished, progress: Progress | None) -> str:
    """The page of the plan, with its simulated step."""
    plan = parse_plan(finished.plan_text)
    try:
        detail = make_detail(plan, progress, request=command.request, graph=graph_of(command, finished, progress))
    except PlanMismatchError as error:
        return plan_page(plan, missing=str(error))
    return plan_page(plan, detail)
