"""`autopar profile`: measure the ops of a model and add the rows to the profile store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option, parse_settings, set_option
from autopar.errors import InputError
from autopar.ir.serialize import check_writable
from autopar.planner.profile import default_store, profile_file


@click.command()
@click.argument("model")
@set_option
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N", help="Where to measure.")
@click.option("--batch", type=int, metavar="N", help="Samples in one microbatch; default: those of example_batch().")
@click.option("--out", metavar="FILE", help="Where to add the rows; default: the store that 'autopar plan' reads.")
@json_option
def profile(
    model: str, *, settings: tuple[str, ...], device: str, batch: int | None, out: str | None, as_json: bool
) -> None:
    """Measure the ops of MODEL at their local shapes; 'autopar plan' prefers these rows to its model."""
    if batch is not None and batch < 1:
        raise InputError(f"--batch must be at least 1, got {batch}")
    path = Path(out) if out is not None else default_store()
    if out is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    with progress_line(as_json) as progress:
        report = profile_file(model, parse_settings(settings), device, path, batch_size=batch, progress=progress)
    if as_json:
        print_json(asdict(report))
        return
    click.echo(
        f"measured {report.num_measured} local ops on {report.device}; {report.path} holds {report.num_rows} rows"
    )
    for target, reason in sorted(report.skipped.items()):
        click.echo(f"  left out {target}: {reason}")
