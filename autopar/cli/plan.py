"""`autopar plan`: make a plan, print it, write it."""

from __future__ import annotations

import json
from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import build_request, cache_option, json_option, model_settings, request_options, set_option
from autopar.ir.serialize import check_writable, write_atomic
from autopar.planner.recall import Command, finished_plan
from autopar.report.text import closing_hints, wrapped


@click.command()
@click.argument("model")
@request_options
@set_option
@click.option("--out", default="plan.json", show_default=True, metavar="FILE", help="Where to write the plan.")
@cache_option
@json_option
def plan(model: str, settings: tuple[str, ...], out: str, as_json: bool, use_cache: bool, **options: Any) -> None:
    """Plan MODEL (a Python file, or hf:config.json) and write the plan file."""
    command = Command(model, model_settings(model, settings, options), build_request(options), use_cache)
    check_writable(out)
    with progress_line(as_json) as progress:
        finished = finished_plan(command, progress)
    write_atomic(out, finished.plan_text)
    if as_json:
        print_json(json.loads(finished.plan_text))
        return
    told = wrapped("Cache", "made before from the same inputs; --no-cache plans anew") if finished.is_recalled else []
    click.echo("\n".join([finished.report, *told, *closing_hints(out)]))
