"""Reading: energy of one window, with its source, scope and reason where it is unknown; and meters without a device.

A meter never reports a silent zero: no device, no permission, a counter that stands still or runs backwards, or a
window shorter than the counter's cadence give a reading without a value and with the reason. One meter serves one
node; the caller synchronises its devices before `start` and before `stop`.

Cadence and error of a counter: it steps about every 100 ms, so a window is within 0.1 s of power at either end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autopar.errors import InputError

COUNTER_STEP_S = 0.1
MIN_WINDOW_S = 1.0
STEADY_WINDOW_S = 2.0
"""Shorter windows scatter and read low, since the chip is still cold."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of one window.

    Attributes:
        value_j: joules, or None if unknown.
        label: `measured`, `assumed` (a share taken from configuration) or `unknown`.
        source: `counter`, `integrated`, `zeus`, `replay`, `constant` or `none`.
        scope: `gpu` (boards), `module` (boards with their processors), `package` (processors with their memory where
            counted), `node` or `none`.
        window_s: length of the window.
        low_j, high_j: bounds; None if unknown.
        reason: why the value is unknown or doubtful, and what it holds besides the run; else "".
        devices: identities of what was read; equal on two processes that read the same counters.
        disagreement: joules by integrated power over those by the counter, less 1; None if not compared.
    """

    value_j: float | None
    label: str
    source: str
    scope: str
    window_s: float
    low_j: float | None = None
    high_j: float | None = None
    reason: str = ""
    devices: tuple[str, ...] = ()
    disagreement: float | None = None


def unknown(reason: str, window_s: float, scope: str = "none", devices: tuple[str, ...] = ()) -> Reading:
    """A reading without a value."""
    return Reading(None, "unknown", "none", scope, window_s, reason=reason, devices=devices)


def joined(*reasons: str) -> str:
    """Reasons one after the other, each once, without the empty ones."""
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def doubt_of(window_s: float) -> str:
    """What to say of a window of this length; "" of one that is long enough."""
    if window_s < MIN_WINDOW_S:
        return "window below 1 s: within 10 % at best"
    return "window below 2 s: such windows scatter and read low" if window_s < STEADY_WINDOW_S else ""


class EnergyMeter(Protocol):
    """`start` opens a window, `stop` closes it."""

    def start(self) -> None: ...

    def stop(self) -> Reading: ...


class NullMeter:
    """Where nothing can be measured: every reading is unknown, for the reason given."""

    def __init__(
        self, reason: str = "no energy counter on this machine", clock: Callable[[], float] = time.perf_counter
    ):
        self.reason = reason
        self._clock = clock
        self._began = clock()

    def start(self) -> None:
        self._began = self._clock()

    def stop(self) -> Reading:
        return unknown(self.reason, self._clock() - self._began)


class ReplayMeter:
    """Returns recorded readings in order: for tests and for examples without a device."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self._readings = list(readings)

    @classmethod
    def from_file(cls, path: Path) -> ReplayMeter:
        """A JSON list of objects with the fields of `Reading`. Raises InputError if it is not one."""
        try:
            return cls([Reading(**row) for row in json.loads(path.read_text(encoding="utf-8"))])
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not a list of recorded readings: {error}") from error

    def start(self) -> None:
        """Nothing to do."""

    def stop(self) -> Reading:
        return self._readings.pop(0) if self._readings else unknown("the recording has ended", 0.0)


@dataclass(frozen=True, slots=True)
class Counter:
    """State of cumulative counters at one moment: joules, or the reason why they cannot be read."""

    joules: tuple[float, ...]
    at_s: float
    reason: str = ""


def difference(first: Counter, last: Counter, scope: str, names: Sequence[str] = ()) -> Reading:
    """Reading between two states of the same counters.

    Args:
        first, last: begin and end.
        scope: what the counters cover.
        names: what a reason calls each of them, if there are several.
    """
    window_s = last.at_s - first.at_s
    if first.reason or last.reason:
        return unknown(first.reason or last.reason, window_s, scope)
    if window_s < COUNTER_STEP_S:
        return unknown(f"window of {window_s:.3f} s is shorter than the counter's step of 0.1 s", window_s, scope)
    parts = [b - a for a, b in zip(first.joules, last.joules, strict=True)]
    for index, part in enumerate(parts):
        which = f" of {names[index]}" if len(parts) > 1 and len(names) == len(parts) else ""
        if part < 0:
            return unknown(f"the energy counter{which} ran backwards", window_s, scope)
        if part == 0:
            return unknown(f"the energy counter{which} did not move", window_s, scope)
    total = sum(parts)
    error = min(total, COUNTER_STEP_S * total / window_s)
    return Reading(
        total, "measured", "counter", scope, window_s, total - error, total + error, doubt_of(window_s)
    )  # fmt: skip
