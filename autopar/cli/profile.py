"""`autopar profile`: measure the ops of a model and the device, and add both to the profile store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option, parse_settings, set_option
from autopar.errors import InputError
from autopar.ir.serialize import check_writable
from autopar.planner.profile import ProfileRequest, default_store, profile_file


@click.command()
@click.argument("model")
@set_option
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N", help="Where to measure.")
@click.option(
    "--batch",
    type=int,
    multiple=True,
    metavar="N",
    help="Samples in one microbatch; default: those of example_batch(). May be repeated.",
)
@click.option("--processes", type=int, default=2, show_default=True, help="Processes that measure at once on the CPU.")
@click.option("--quick", is_flag=True, help="Fewer repeats.")
@click.option(
    "--lock-clocks", is_flag=True, help="Measure a GPU's power at about five clocks, where they may be set; restored."
)
@click.option("--out", metavar="FILE", help="Where to add the rows; default: the store that 'autopar plan' reads.")
@json_option
def profile(
    model: str,
    *,
    settings: tuple[str, ...],
    device: str,
    batch: tuple[int, ...],
    processes: int,
    quick: bool,
    lock_clocks: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Measure the ops of MODEL at their local shapes, and the device: rates, overheads, transfers, updates, power.

    'autopar plan' prefers these rows to its model, and models other shapes by the device's own numbers.
    """
    for option, given in (("--batch", min(batch, default=1)), ("--processes", processes)):
        if given < 1:
            raise InputError(f"{option} must be at least 1, got {given}")
    if lock_clocks and device == "cpu":
        raise InputError("--lock-clocks needs --device cuda:N")
    path = Path(out) if out is not None else default_store()
    if out is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    with progress_line(as_json) as progress:
        request = ProfileRequest(device, batch, processes, quick, lock_clocks)
        report = profile_file(model, parse_settings(settings), request, path, progress=progress)
    if as_json:
        print_json(asdict(report))
        return
    click.echo(
        f"measured {report.num_measured} local ops on {report.device}, energy of {report.num_energies}; "
        f"{report.path} holds {report.num_rows} rows"
    )
    for number, value in sorted(report.numbers.items()):
        click.echo(f"  {number} {value:.4g}")
    for kind, (latency_s, s_per_byte) in report.lines.items():
        click.echo(f"  {kind}: {1e6 * latency_s:.3g} us + {1e9 * s_per_byte:.3g} ns per byte")
    for target, reason in sorted(report.skipped.items()):
        click.echo(f"  left out {target}: {reason}")
    for note in report.notes:
        click.echo(f"  note: {note}")
