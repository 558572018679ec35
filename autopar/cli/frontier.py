"""`autopar frontier`: the plans between the fastest and the thriftiest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import build_request, frontier_options, json_option, model_settings, set_option
from autopar.cli.page import check_report, report_option
from autopar.errors import InputError
from autopar.ir.serialize import check_writable, write_atomic
from autopar.planner.frontier import trace_frontier
from autopar.planner.request import choose_target
from autopar.planner.store import remember, store_key, write_store
from autopar.report.figure import check_plot
from autopar.report.frontier import frontier_json, frontier_report, plot_frontier
from autopar.report.page_curves import frontier_page


@click.command()
@click.argument("model")
@frontier_options
@set_option
@click.option("--points", default=32, show_default=True, metavar="N", help="Most plans to look for.")
@click.option("--plot", metavar="FILE", help="Draw the frontier, e.g. into frontier.svg.")
@click.option("--out-dir", metavar="DIR", help="Write the plan of every point there, and an index for replan.")
@report_option
@json_option
def frontier(
    model: str,
    *,
    settings: tuple[str, ...],
    points: int,
    plot: str | None,
    out_dir: str | None,
    report: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Trace the time-energy frontier of MODEL: what a longer step saves in energy."""
    request = build_request(options)
    chosen = model_settings(model, settings, options)
    if points < 1:
        raise InputError(f"--points must be at least 1, got {points}")
    if plot is not None:
        check_writable(plot, "--plot")
        check_plot()
    check_report(report, plot)
    directory = None if out_dir is None else _make_directory(out_dir)
    with progress_line(as_json) as progress:
        found = trace_frontier(model, chosen, request, points, progress)
    title = f"{model} on up to {request.num_gpus} GPUs"
    if plot is not None:
        plot_frontier(found.plans, title, plot)
    target = choose_target(request)
    remember(found.plans, target)
    if directory is not None and found.plans:
        named = {f"plan_{i:02d}.json": plan for i, plan in enumerate(found.plans)}
        write_store(directory, store_key(found.plans[0], target), named)
    shown = (found.plans, found.num_dropped, found.complete)
    if report is not None:
        write_atomic(report, frontier_page(*shown, title))
    print_json(frontier_json(*shown)) if as_json else click.echo(frontier_report(*shown))


def _make_directory(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the directory {name}: {error.strerror}; give another one with --out-dir"
        ) from error
    check_writable(path / "plan_00.json")
    return path
