"""`autopar validate`: predicted against published or measured rows."""

from __future__ import annotations

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option
from autopar.errors import InputError
from autopar.ir.serialize import check_writable
from autopar.planner.validate import validate_tables
from autopar.report.figure import check_plot
from autopar.report.validation import plot_validation, validation_json, validation_report


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--plot", metavar="FILE", help="Draw predicted over measured figures, e.g. into validation.svg.")
@click.option("--jobs", type=int, metavar="N", help="Processes; default: one per processor.")
@click.option("--free", is_flag=True, help="Also find the best plan on the same GPUs for every row (takes longer).")
@json_option
def validate(files: tuple[str, ...], *, plot: str | None, jobs: int | None, free: bool, as_json: bool) -> None:
    """Price the rows of CSV tables and hold the prices against what was measured."""
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    if plot is not None:
        check_writable(plot)
        check_plot()
    with progress_line(as_json) as progress:
        found = validate_tables(files, jobs=jobs, free=free, progress=progress)
    if plot is not None:
        plot_validation(found, plot)
    print_json(validation_json(found)) if as_json else click.echo(validation_report(found))
