"""`autopar gpus`: the devices that have a cost model."""

from __future__ import annotations

from typing import Any

import click

from autopar.cli.console import print_json
from autopar.cli.options import json_option
from autopar.planner.detect import choose_gpu, known_gpus
from autopar.report.text import table
from autopar.units import GB, TB, format_bytes


@click.command()
@json_option
def gpus(as_json: bool) -> None:
    """List the GPUs that can be planned for, and which one is the default here."""
    choice = choose_gpu(None)
    devices = known_gpus()
    if as_json:
        print_json({"gpus": [_device_json(d) for d in devices], "default": choice.name, "origin": choice.origin})
        return
    rows: list[tuple[str, ...]] = [("name", "memory", "bandwidth", "16-bit", "32-bit", "idle", "limit", "per node")]
    rows += [_row(device) for device in devices]
    click.echo("\n".join(table(rows)))
    click.echo(f"\n{choice.note}")


def _device_json(device: Any) -> dict[str, Any]:
    return {
        "name": device.name,
        "title": device.title,
        "memory_bytes": device.capacity_bytes,
        "memory_bytes_per_s": device.memory_bytes_per_s,
        "peak_flops": dict(device.peak_flops),
        "idle_w": device.idle_w,
        "limit_w": device.limit_w,
        "gpus_per_node": device.gpus_per_node,
    }


def _row(device: Any) -> tuple[str, ...]:
    half = max(device.peak("bfloat16"), device.peak("float16"))
    return (
        device.name,
        format_bytes(device.capacity_bytes),
        f"{device.memory_bytes_per_s / GB:.0f} GB/s",
        f"{half / TB:.4g} TF",
        f"{device.peak('float32') / TB:.4g} TF",
        f"{device.idle_w:.0f} W",
        f"{device.limit_w:.0f} W",
        str(device.gpus_per_node),
    )
