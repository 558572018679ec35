"""NodeMeter: all that can be measured on one node, GPUs and processors apart; and sums over nodes.

One process of a node holds the meter, whatever the number of ranks. `add_up` joins the readings of all of them and
counts each counter once, also where two groups of ranks stand on one machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autopar.meters.gpu import NvmlMeter
from autopar.meters.rapl import RAPL_ROOT, RaplMeter
from autopar.meters.reading import Reading, joined, unknown

ALL_GPUS = ("all",)
"""Stands for every GPU of the node."""


@dataclass(frozen=True, slots=True)
class NodeReading:
    """Energy of one window: of GPUs (None: the run uses none) and of processors with their memory."""

    gpu: Reading | None
    host: Reading

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def node_reading(content: dict[str, Any]) -> NodeReading:
    """Inverse of `as_json`."""
    gpu = content["gpu"]
    return NodeReading(None if gpu is None else _reading(gpu), _reading(content["host"]))


def _reading(content: dict[str, Any]) -> Reading:
    return Reading(**{**content, "devices": tuple(content["devices"])})


class NodeMeter:
    """A context. Nothing fails for want of a counter: the readings say what is unknown and why.

    Args:
        gpus: indices or identifiers, as for `NvmlMeter`; ALL_GPUS; None: the run uses no GPU.
        nvml, rapl_root: doubles.
    """

    def __init__(
        self, gpus: Sequence[int | str] | None = ALL_GPUS, nvml: Any = None, rapl_root: Path = RAPL_ROOT
    ) -> None:
        self._gpu = None if gpus is None else NvmlMeter(None if gpus is ALL_GPUS else gpus, nvml)
        self._host = RaplMeter(rapl_root)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> NodeMeter:
        if self._gpu is not None:
            self._open.enter_context(self._gpu)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def start(self) -> None:
        """Open a window."""
        self._host.start()
        if self._gpu is not None:
            self._gpu.start()

    def stop(self) -> NodeReading:
        """Close the window."""
        gpu = None if self._gpu is None else self._gpu.stop()
        return NodeReading(gpu, self._host.stop())


def add_up(readings: Sequence[NodeReading]) -> NodeReading | None:
    """Sum over nodes; None of none. What one node does not know is unknown of all."""
    if not readings:
        return None
    boards = [reading.gpu for reading in readings if reading.gpu is not None]
    return NodeReading(_sum(boards) if boards else None, _sum([reading.host for reading in readings]))


def _sum(readings: Sequence[Reading]) -> Reading:
    """Sum of readings of different counters; of equal counters only the first counts."""
    by_devices: dict[tuple[str, ...], Reading] = {}
    for index, reading in enumerate(readings):
        by_devices.setdefault(reading.devices or (str(index),), reading)
    distinct = list(by_devices.values())
    first, devices = distinct[0], tuple(name for reading in distinct for name in reading.devices)
    window_s = max(reading.window_s for reading in distinct)
    for reading in distinct:
        if reading.value_j is None:
            return unknown(reading.reason, window_s, reading.scope, devices)
    if len(set(devices)) < len(devices):
        return unknown("two processes measured some of the same devices", window_s, first.scope, devices)
    return replace(
        first,
        value_j=sum(reading.value_j or 0.0 for reading in distinct),
        low_j=sum(_bound(reading.low_j, reading) for reading in distinct),
        high_j=sum(_bound(reading.high_j, reading) for reading in distinct),
        source=_join(reading.source for reading in distinct),
        scope=_join(reading.scope for reading in distinct),
        window_s=window_s,
        reason=joined(*(reading.reason for reading in distinct)),
        devices=devices,
        disagreement=max((r.disagreement for r in distinct if r.disagreement is not None), key=abs, default=None),
    )


def _bound(bound_j: float | None, reading: Reading) -> float:
    return (reading.value_j or 0.0) if bound_j is None else bound_j


def _join(words: Iterable[str]) -> str:
    return ", ".join(sorted(set(words)))
