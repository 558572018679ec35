"""One process of a measurement: ops of a model at each microbatch size, and the device they run on.

Processes work through the same list side by side, each op begun together, so that they share memory and caches as the
ranks of a plan do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from autopar.ir.graph import OpGraph
from autopar.ir.profile import DeviceProfile, MeasuredLine, OpProfile
from autopar.profiler.device import measure_rates, measure_transfers, measure_update
from autopar.profiler.measure import Settings, profile_ops, provenance_of
from autopar.profiler.store import encode_device, encode_row, parse_device, parse_row


@dataclass(frozen=True)
class Merged:
    """What all processes found: medians over them."""

    rows: tuple[OpProfile, ...]
    device: DeviceProfile
    skipped: Mapping[str, str]


def measure_graphs(
    graphs: Sequence[OpGraph], settings: Settings, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Rows, skipped ops and the device, as JSON; every process of the run must call, with equal arguments."""
    is_joint = dist.is_initialized() and dist.get_world_size() > 1
    lines = measure_transfers(settings) if is_joint else ()
    numbers = measure_rates(settings)
    device = DeviceProfile(
        settings.device_name, numbers, (*lines, *measure_update(settings)), provenance_of(settings)
    )  # fmt: skip
    skipped: dict[str, str] = {}
    rows: dict[Any, OpProfile] = {}
    for graph in graphs:
        run = profile_ops(graph, settings, progress, known=rows.keys())
        rows |= {row.key: row for row in run.rows}
        skipped |= run.skipped
    return {"rows": [encode_row(row) for row in rows.values()], "device": encode_device(device), "skipped": skipped}


def merged(results: Sequence[Mapping[str, Any]]) -> Merged:
    """Of `measure_graphs` in every process."""
    by_rank = [[parse_row(row) for row in result["rows"]] for result in results]
    rows = [_middle_row(same) for same in zip(*by_rank, strict=True)]
    devices = [parse_device(result["device"]) for result in results]
    return Merged(tuple(rows), _middle_device(devices), results[0]["skipped"])


def _middle_row(same: Sequence[OpProfile]) -> OpProfile:
    return replace(
        same[0],
        forward_s=statistics.median(row.forward_s for row in same),
        backward_s=statistics.median(row.backward_s for row in same),
        spread=max(row.spread for row in same),
    )


def _middle_device(same: Sequence[DeviceProfile]) -> DeviceProfile:
    numbers = [
        replace(found[0], value=statistics.median(number.value for number in found))
        for found in zip(*(device.numbers for device in same), strict=True)
    ]
    lines = [_middle_line(found) for found in zip(*(device.lines for device in same), strict=True)]
    return replace(same[0], numbers=tuple(numbers), lines=tuple(lines))


def _middle_line(same: Sequence[MeasuredLine]) -> MeasuredLine:
    return replace(
        same[0],
        latency_s=statistics.median(line.latency_s for line in same),
        s_per_byte=statistics.median(line.s_per_byte for line in same),
        error=max(line.error for line in same),
    )
