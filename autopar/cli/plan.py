"""`autopar plan`: make a plan, print it, write it."""

from __future__ import annotations

from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import build_request, json_option, parse_settings, request_options, set_option
from autopar.ir.serialize import check_writable, plan_json, save_plan
from autopar.planner.plan import make_plan
from autopar.report.text import plan_report


@click.command()
@click.argument("model")
@request_options
@set_option
@click.option("--out", default="plan.json", show_default=True, metavar="FILE", help="Where to write the plan.")
@json_option
def plan(model: str, settings: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Plan MODEL (a Python file, or hf:config.json) and write the plan file."""
    request = build_request(options)
    chosen = parse_settings(settings)
    check_writable(out)
    with progress_line(as_json) as progress:
        planned = make_plan(model, chosen, request, progress)
    save_plan(planned.plan, out)
    if as_json:
        print_json(plan_json(planned.plan))
    else:
        click.echo(plan_report(planned.plan, planned.graph, out))
