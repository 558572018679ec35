"""`autopar sweep`: time and energy over the number of GPUs, predicted and, of few of them, measured here."""

from __future__ import annotations

import re
from typing import Any

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import build_request, json_option, model_settings, set_option, sweep_options
from autopar.cli.page import check_report, report_option
from autopar.cli.quantities import parse_seconds
from autopar.errors import InputError
from autopar.ir.serialize import check_writable, write_atomic
from autopar.planner.request import choose_target
from autopar.planner.store import remember
from autopar.planner.sweep import measure_sweep, measuring_here, sweep_model
from autopar.report.figure import check_plot
from autopar.report.page_curves import sweep_page
from autopar.report.sweep import Runs, plot_sweep, sweep_json, sweep_report

MOST_COUNTS = 64


@click.command()
@click.argument("model")
@click.option("--gpus", "counts", required=True, metavar="N,N,...", help="Numbers of GPUs, e.g. 1,2,4,8.")
@sweep_options
@set_option
@click.option("--measure", is_flag=True, help="Also run the plans of few GPUs on this machine.")
@click.option("--measure-most", type=int, metavar="N", help="Most GPUs or processes to run; default: those here.")
@click.option(
    "--measure-steps", default=6, show_default=True, metavar="N", help="Steps of each run; the first is apart."
)
@click.option("--measure-limit", default="10min", show_default=True, metavar="TIME", help="Longest run, as predicted.")
@click.option("--plot", metavar="FILE", help="Draw time and energy over the number of GPUs, e.g. into sweep.svg.")
@report_option
@json_option
def sweep(
    model: str,
    *,
    counts: str,
    settings: tuple[str, ...],
    measure: bool,
    measure_most: int | None,
    measure_steps: int,
    measure_limit: str,
    plot: str | None,
    report: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan MODEL on each number of GPUs and show where more of them stop paying."""
    numbers, measuring = parse_counts(counts), None
    if measure:
        limit_s = parse_seconds(measure_limit)
        options["gpu"], measuring = measuring_here(options["gpu"], measure_most, measure_steps, limit_s)
    request = build_request({**options, "gpus": max(numbers), "use_all": True, "cluster": None})
    chosen = model_settings(model, settings, options)
    if plot is not None:
        check_writable(plot, "--plot")
        check_plot()
    check_report(report, plot)
    with progress_line(as_json) as progress:
        found = sweep_model(model, chosen, request, numbers, progress)
        if measuring is not None:
            found = measure_sweep(found, measuring, progress)
    runs = Runs(found.measured, found.unmeasured)
    remember(found.planned, choose_target(request))
    title = f"{model} on {request.gpu or 'the default GPU'}"
    if plot is not None:
        plot_sweep(found.planned, title, plot, runs)
    if report is not None:
        write_atomic(report, sweep_page(found.planned, found.missing, title, runs))
    if as_json:
        print_json(sweep_json(found.planned, found.missing, runs))
    else:
        click.echo(sweep_report(found.planned, found.missing, runs))


def parse_counts(text: str, flag: str = "--gpus", most: int = MOST_COUNTS) -> tuple[int, ...]:
    """`1,2,4,8` to numbers in rising order, each once. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,7}", part) and int(part) > 0 for part in parts):
        raise InputError(f"{flag} {text}: expected whole numbers of at least 1, e.g. 1,2,4,8")
    if len(parts) > most:
        raise InputError(f"{flag} names {len(parts)} numbers; at most {most}")
    return tuple(sorted({int(part) for part in parts}))
