"""DeviceSpec: the numbers of one device file in `costmodels/`, checked and in base units.

What each number means is said once, in `costmodels/README.md`; the attribute names are the keys of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.ir.profile import MeasuredNumber

LABEL_BY_TAG: Mapping[str, str] = {"read": "assumed", "known": "assumed", "estimate": "assumed", "measured": "measured"}
"""Only a number that autopar measured on the device is `measured`; every other one is taken on trust."""

OPTIONAL_LINK_KEYS = ("efficiency", "reduction_bytes_per_s", "ring_fill", "bridge_bytes_per_s")
OPTIONAL_KERNELS = (
    "multiprocessors", "gemm_depth", "gemm_backward_efficiency", "attention_backward_efficiency", "dispatch_s",
    "tf32_efficiency",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Number:
    """One entry of a device file. `path` is its place, e.g. `memory.bandwidth_bytes_per_s`."""

    path: str
    value: float
    unit: str
    source: str
    tag: str


@dataclass(frozen=True, slots=True)
class Link:
    """Alpha-beta parameters of one link level.

    Attributes:
        bandwidth_bytes_per_s: per direction; of one GPU inside a node as collectives reach it; between nodes the line
            rate of all ports of a node.
        latency_s, latency_per_hop_s: fixed part of a collective, and per further rank (`collective`).
        p2p_latency_s: fixed part of a send.
        j_per_byte: dynamic energy of one byte sent.
        efficiency: share of the line rate that collectives reach between nodes.
        reduction_bytes_per_s: rate at which the switch adds for one GPU; 0: it does not.
        ring_fill: steps of a ring that are lost to starting and draining.
        bridge_bytes_per_s: between the two halves of a node, per direction.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    latency_per_hop_s: float
    p2p_latency_s: float
    j_per_byte: float
    efficiency: float = 1.0
    reduction_bytes_per_s: float = 0.0
    ring_fill: float = 0.0
    bridge_bytes_per_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Route:
    """To where memory of a device can be offloaded, and from there, by one of the two at a time.

    Attributes:
        bytes_per_s: per direction: of one device to its host; of a node's disks.
        j_per_byte: dynamic energy of one byte.
    """

    bytes_per_s: float
    j_per_byte: float


@dataclass(frozen=True, slots=True)
class ClockControl:
    """SM clocks and the voltage they need, as a share of the least one.

    Attributes:
        step_hz: spacing of the clocks that the driver locks; 0: it locks none, and only a power limit lowers them.
        ridge_share: up to this share of the highest clock the voltage is the least.
        voltage_rise: voltage at the highest clock, less 1; linear in between.
        blocked_share: see `power`.
    """

    step_hz: float
    ridge_share: float
    voltage_rise: float
    blocked_share: float


@dataclass(frozen=True)
class DeviceSpec:
    """One device. Rates are dense and at the highest clock; `peak_flops` is by dtype name, plus `tf32` where it has it.

    Without `multiprocessors` GEMMs are not cut into tiles; an efficiency of backward that is 0 is that of forward, one
    of tf32 that is 0 is that of other GEMMs.
    `clock_control` is None where nothing is known of lower clocks; `clock_share` is the clock that is set over the
    highest.
    `sustained_share` is the clock, over the highest, at which large GEMMs hold `limit_w`; rates are those there.
    `memory_clock_share` of the dynamic power of memory traffic follows the clock.
    `unseen_share` of the memory that moves is handed out beside what is modelled.
    `power_limit_w` is the limit that somebody set; 0: nobody has, and `limit_w` holds.
    `host_link` and `disk` are None where nothing is known of them.
    """

    name: str
    title: str
    kind: str
    peak_flops: Mapping[str, float]
    capacity_bytes: int
    reserve_bytes: int
    memory_bytes_per_s: float
    memory_efficiency: float
    gemm_efficiency: float
    gemm_ramp_s: float
    convolution_efficiency: float
    attention_efficiency: float
    launch_overhead_s: float
    overlap_slowdown: float
    topology: str
    intra_node: Link
    inter_node: Link
    gpus_per_node: int
    idle_w: float
    blocked_w: float
    limit_w: float
    host_w_per_node: float
    gemm_share: float
    memory_share: float
    time_uncertainty: float
    energy_uncertainty: float
    memory_uncertainty: float
    clock_max_hz: float
    clock_min_hz: float
    clock_control: ClockControl | None
    numbers: tuple[Number, ...]
    clock_share: float = 1.0
    sustained_share: float = 1.0
    power_limit_w: float = 0.0
    memory_clock_share: float = 0.0
    multiprocessors: float = 0.0
    gemm_depth: float = 0.0
    gemm_backward_efficiency: float = 0.0
    attention_backward_efficiency: float = 0.0
    dispatch_s: float = 0.0
    tf32_efficiency: float = 0.0
    unseen_share: float = 0.0
    host_link: Route | None = None
    disk: Route | None = None

    @property
    def speed(self) -> float:
        """Of computing, over that at the highest clock, which the power limit does not let large kernels reach."""
        return min(1.0, self.clock_share / self.sustained_share)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of a dtype; one without its own rate (integers, bf16 before Ampere) runs at float32's."""
        return self.peak_flops.get(dtype, self.peak_flops["float32"])


def read_device(path: Path, measured: Sequence[MeasuredNumber] = ()) -> DeviceSpec:
    """Reads one device file; measured numbers replace those of the file.

    Raises:
        AutoparError: if a number is missing, not finite, not positive or without unit and source.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    found = (*_numbers(data, "", path.name), *(Number(m.path, m.value, m.unit, m.source, "measured") for m in measured))
    numbers = {number.path: number for number in found}

    def value(key: str) -> float:
        if key not in numbers:
            raise AutoparError(f"{path.name}: {key} is missing")
        return numbers[key].value

    prefix = "peak_flops."
    return DeviceSpec(
        name=data["name"],
        title=data["title"],
        kind=data["kind"],
        peak_flops={k.removeprefix(prefix): n.value for k, n in numbers.items() if k.startswith(prefix)},
        capacity_bytes=int(value("memory.capacity_bytes")),
        reserve_bytes=int(value("memory.reserve_bytes")),
        memory_bytes_per_s=value("memory.bandwidth_bytes_per_s"),
        memory_efficiency=value("memory.efficiency"),
        gemm_efficiency=value("kernels.gemm_efficiency"),
        gemm_ramp_s=value("kernels.gemm_ramp_s"),
        convolution_efficiency=value("kernels.convolution_efficiency"),
        attention_efficiency=value("kernels.attention_efficiency"),
        launch_overhead_s=value("kernels.launch_overhead_s"),
        overlap_slowdown=value("kernels.overlap_slowdown"),
        topology=data["intra_node"]["topology"],
        intra_node=_link(numbers, value, "intra_node", "power.link_j_per_byte"),
        inter_node=_link(numbers, value, "inter_node", "power.network_j_per_byte"),
        gpus_per_node=int(value("gpus_per_node")),
        idle_w=value("power.idle_w"),
        blocked_w=value("power.blocked_w"),
        limit_w=value("power.limit_w"),
        host_w_per_node=value("power.host_w_per_node"),
        gemm_share=value("power.gemm_share"),
        memory_share=value("power.memory_share"),
        time_uncertainty=value("uncertainty.time"),
        energy_uncertainty=value("uncertainty.energy"),
        memory_uncertainty=value("uncertainty.memory"),
        clock_max_hz=value("clock.max_hz"),
        clock_min_hz=value("clock.min_hz"),
        clock_control=_clock_control(numbers),
        numbers=tuple(numbers[key] for key in sorted(numbers)),
        sustained_share=value("clock.sustained_share") if "clock.sustained_share" in numbers else 1.0,
        memory_clock_share=value("power.memory_clock_share") if "power.memory_clock_share" in numbers else 0.0,
        unseen_share=value("memory.unseen_share") if "memory.unseen_share" in numbers else 0.0,
        host_link=_route(numbers, value, "host_link"),
        disk=_route(numbers, value, "disk"),
        **{key: numbers[f"kernels.{key}"].value for key in OPTIONAL_KERNELS if f"kernels.{key}" in numbers},
    )


def _link(numbers: Mapping[str, Number], value: Callable[[str], float], level: str, energy_key: str) -> Link:
    """One link level; `value` finds numbers that must be there."""
    return Link(
        value(f"{level}.bandwidth_bytes_per_s"),
        value(f"{level}.latency_s"),
        value(f"{level}.latency_per_hop_s"),
        value(f"{level}.p2p_latency_s"),
        value(energy_key),
        **{key: value(f"{level}.{key}") for key in OPTIONAL_LINK_KEYS if f"{level}.{key}" in numbers},
    )


def _route(numbers: Mapping[str, Number], value: Callable[[str], float], name: str) -> Route | None:
    rate = f"{name}.bandwidth_bytes_per_s"
    return Route(value(rate), value(f"{name}.j_per_byte")) if rate in numbers else None


def _clock_control(numbers: Mapping[str, Number]) -> ClockControl | None:
    keys = [f"clock.{name}" for name in ("ridge_share", "voltage_rise", "blocked_share")]
    if not all(key in numbers for key in keys):
        return None
    step_hz = numbers["clock.step_hz"].value if "clock.step_hz" in numbers else 0.0
    return ClockControl(step_hz, *(numbers[key].value for key in keys))


def _numbers(data: Any, path: str, file: str) -> Iterator[Number]:
    """Every `{value, unit, source, tag}` below a JSON object."""
    if not isinstance(data, dict):
        return
    if "value" in data:
        number = Number(path, float(data["value"]), data.get("unit", ""), data.get("source", ""), data.get("tag", ""))
        is_sound = math.isfinite(number.value) and number.value > 0 and number.unit and number.source
        if not is_sound or number.tag not in LABEL_BY_TAG:
            raise AutoparError(f"{file}: {path} needs a finite positive value, a unit, a source and a known tag")
        yield number
        return
    for key, child in data.items():
        yield from _numbers(child, f"{path}.{key}" if path else key, file)
