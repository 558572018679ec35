"""`autopar meter`: what this machine can measure, and how far its counters agree."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from autopar.cli.console import print_json
from autopar.cli.options import json_option
from autopar.errors import InputError
from autopar.planner.meter import MeterCheck, check_meters
from autopar.units import format_joules, format_watts

if TYPE_CHECKING:
    from autopar.meters import Reading

LONGEST_S = 3600.0


@click.command()
@click.option("--seconds", type=float, default=5.0, show_default=True, metavar="S", help="Length of the window.")
@click.option("--zeus", "with_zeus", is_flag=True, help="Measure with Zeus too, if it is installed, and compare.")
@json_option
def meter(seconds: float, with_zeus: bool, as_json: bool) -> None:
    """Read every energy counter of this machine over one window, beside whatever runs on it.

    Says for GPUs and processors what is measured and how (counter, integrated power), over which devices, within which
    bounds, and why where it is unknown. Needs no rights, and changes nothing.
    """
    if not 0 < seconds <= LONGEST_S:
        raise InputError(f"--seconds must be above 0 and at most {LONGEST_S:g}, got {seconds:g}")
    found = check_meters(seconds, with_zeus=with_zeus)
    print_json(asdict(found)) if as_json else click.echo("\n".join(_lines(found)))


def _lines(found: MeterCheck) -> list[str]:
    lines = [*_reading_lines("GPUs", found.gpus), *_reading_lines("processors", found.host)]
    if found.zeus is not None:
        lines += _reading_lines("Zeus", found.zeus)
    if found.gpus.disagreement is not None:
        lines.append(f"integrated power against the counter: {found.gpus.disagreement:+.1%}")
    if found.zeus_disagreement is not None:
        lines.append(f"Zeus against this meter: {found.zeus_disagreement:+.1%}")
    return lines


def _reading_lines(name: str, reading: Reading) -> list[str]:
    if reading.value_j is None:
        return [f"{name}: unknown: {reading.reason}"]
    bounds = "" if reading.low_j is None or reading.high_j is None else (
        f" ({format_joules(reading.low_j)} to {format_joules(reading.high_j)})"
    )  # fmt: skip
    watts = format_watts(reading.value_j / reading.window_s)
    lines = [
        f"{name}: {format_joules(reading.value_j)}{bounds} over {reading.window_s:.3g} s, on average {watts}; "
        f"{reading.label}, source {reading.source}, scope {reading.scope}"
    ]
    lines += [f"  {device}" for device in reading.devices]
    return [*lines, *([f"  note: {reading.reason}"] if reading.reason else [])]
