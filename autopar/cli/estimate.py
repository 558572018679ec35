"""`autopar estimate`: price a configuration, beside the free plan."""

from __future__ import annotations

from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import build_request, json_option, model_settings, request_options, set_option
from autopar.ir.plan import Plan
from autopar.ir.serialize import prediction_json
from autopar.planner.estimate import estimate_model
from autopar.report.explain import compare
from autopar.report.frontier import point_words
from autopar.report.text import plan_report, wrapped
from autopar.units import format_bytes


@click.command()
@click.argument("model")
@request_options
@set_option
@json_option
def estimate(model: str, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Price MODEL under --pin, by the search and simulation that make plans; writes nothing."""
    request = build_request(options)
    chosen = model_settings(model, settings, options)
    with progress_line(as_json) as progress:
        found = estimate_model(model, chosen, request, progress)
    planned, free = found.pinned.planned, found.free
    pinned, has = planned.plan, found.pinned.memory_bytes
    if as_json:
        print_json({**_entry(pinned), "fits": found.pinned.fits, "free": _entry(free)})
        return
    lines = compare(pinned, free, "the free plan", "Free plan: ")
    fits = [] if found.pinned.fits else wrapped("Memory", f"does not fit: a device has {format_bytes(has)}")
    click.echo("\n".join([plan_report(pinned, planned.graph), "", *fits, *lines]))


def _entry(plan: Plan) -> dict[str, Any]:
    return {
        "description": point_words(plan),
        "num_gpus": plan.decisions.num_gpus,
        "predicted": prediction_json(plan.predicted),
    }
