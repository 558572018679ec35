"""Meters: energy of a window of real work, with its source, scope and reason where it is unknown.

A meter never reports a silent zero: no device, no permission, a counter that stands still or runs backwards, or a
window shorter than the counter's cadence give a reading without a value and with the reason. One meter serves one
node; the caller synchronises its devices before `start` and before `stop`.

Ladder of NvmlMeter: difference of the energy counter, else the integral of power samples taken while it is open.
Cadence and error of the counter: it steps about every 100 ms, so a window is within 0.1 s of power at either end.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from autopar.errors import InputError

COUNTER_STEP_S = 0.1
MIN_WINDOW_S = 1.0
SAMPLE_PERIOD_S = 0.05
RAPL_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of one window.

    Attributes:
        value_j: joules, or None if unknown.
        label: `measured`, or `unknown`.
        source: `counter`, `integrated`, `replay` or `none`.
        scope: `gpu` (boards), `package` (processors with their memory where counted), `node` or `none`.
        window_s: length of the window.
        low_j, high_j: bounds from the counter's cadence; None if unknown.
        reason: why the value is unknown or doubtful; else "".
    """

    value_j: float | None
    label: str
    source: str
    scope: str
    window_s: float
    low_j: float | None = None
    high_j: float | None = None
    reason: str = ""


def unknown(reason: str, window_s: float, scope: str = "none") -> Reading:
    """A reading without a value."""
    return Reading(None, "unknown", "none", scope, window_s, reason=reason)


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


def difference(first: Counter, last: Counter, scope: str, wrap_j: Sequence[float] | None = None) -> Reading:
    """Reading between two states of the same counters.

    Args:
        first, last: begin and end.
        scope: what the counters cover.
        wrap_j: for each counter, where it starts again from zero; None if it does not.
    """
    window_s = last.at_s - first.at_s
    if first.reason or last.reason:
        return unknown(first.reason or last.reason, window_s, scope)
    if window_s < COUNTER_STEP_S:
        return unknown(f"window of {window_s:.3f} s is shorter than the counter's step of 0.1 s", window_s, scope)
    parts = [b - a for a, b in zip(first.joules, last.joules, strict=True)]
    if wrap_j is not None:
        parts = [part + wrap if part < 0 else part for part, wrap in zip(parts, wrap_j, strict=True)]
    if any(part < 0 for part in parts):
        return unknown("the energy counter ran backwards", window_s, scope)
    if any(part == 0 for part in parts):
        return unknown("the energy counter did not move", window_s, scope)
    total = sum(parts)
    error = min(total, COUNTER_STEP_S * total / window_s)
    reason = "window below 1 s: within 10 % at best" if window_s < MIN_WINDOW_S else ""
    return Reading(total, "measured", "counter", scope, window_s, total - error, total + error, reason)


class NvmlMeter:
    """Board energy of some GPUs through NVML.

    Args:
        indices: NVML indices; all GPUs if None.
        nvml: the binding (`pynvml`), given by tests; imported when the meter is opened.
        clock: seconds.
    """

    def __init__(
        self, indices: Sequence[int] | None = None, nvml: Any = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._nvml = nvml
        self._indices = indices
        self._clock = clock
        self._handles: list[Any] = []
        self._reason = ""
        self._first = Counter((), 0.0, "the meter was not started")
        self._sampler: _PowerSampler | None = None

    def __enter__(self) -> NvmlMeter:
        """Opens NVML. A failure is no error: it becomes the reason of every reading."""
        if self._nvml is None:
            try:
                import pynvml
            except ImportError:
                self._reason = "NVML binding is missing: pip install nvidia-ml-py"
                return self
            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            wanted = range(count) if self._indices is None else self._indices
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in wanted]
        except self._nvml.NVMLError as error:
            self._reason = f"NVML cannot be opened: {error}"
        else:
            self._reason = "" if self._handles else "NVML finds no GPU"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.finish()
        if self._handles:
            self._nvml.nvmlShutdown()
        self._handles = []

    def start(self) -> None:
        self._first = self._read()
        self._sampler = None
        if self._first.reason and self._handles:
            self._sampler = _PowerSampler(self._power_w, self._clock)
            self._sampler.begin()

    def stop(self) -> Reading:
        if self._sampler is not None:
            reading = self._sampler.finish()
            self._sampler = None
            if reading.value_j is None:
                return unknown(f"{self._first.reason}; {reading.reason}", reading.window_s, "gpu")
            return reading
        return difference(self._first, self._read(), "gpu")

    def _read(self) -> Counter:
        if self._reason or not self._handles:
            return Counter((), self._clock(), self._reason or "the meter is not open")
        try:
            joules = tuple(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 for handle in self._handles)
        except self._nvml.NVMLError as error:
            return Counter((), self._clock(), f"no energy counter: {error}")
        return Counter(joules, self._clock())

    def _power_w(self) -> float | None:
        """Present power of all GPUs, None if it cannot be read."""
        try:
            return float(sum(self._nvml.nvmlDeviceGetPowerUsage(handle) for handle in self._handles)) / 1e3
        except self._nvml.NVMLError:
            return None


class _PowerSampler:
    """Samples power in a thread and integrates it by trapezoids."""

    def __init__(self, power_w: Callable[[], float | None], clock: Callable[[], float]) -> None:
        self._power_w = power_w
        self._clock = clock
        self._samples: list[tuple[float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = 0.0

    def begin(self) -> None:
        self._began = self._clock()
        self._take()
        self._thread.start()

    def finish(self) -> Reading:
        if self._thread.is_alive():
            self._stopped.set()
            self._thread.join()
            self._take()
        window_s = self._clock() - self._began
        if len(self._samples) < 2:
            return unknown("power cannot be read either", window_s, "gpu")
        pairs = zip(self._samples, self._samples[1:], strict=False)
        joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)
        if joules <= 0:
            return unknown("power reads zero", window_s, "gpu")
        reason = "power may be a 1 s average" if window_s >= MIN_WINDOW_S else "window below 1 s; power is an average"
        return Reading(joules, "measured", "integrated", "gpu", window_s, 0.8 * joules, 1.2 * joules, reason)

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_PERIOD_S):
            self._take()

    def _take(self) -> None:
        power = self._power_w()
        if power is not None:
            self._samples.append((self._clock(), power))


class RaplMeter:
    """Processor packages and their memory through Linux powercap. Readable by root alone on most systems.

    Windows must be shorter than the counter's wrap (minutes at full power): a second wrap goes unseen.
    """

    def __init__(self, root: Path = RAPL_ROOT, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._zones = _rapl_zones(root)
        self._first = Counter((), 0.0, "the meter was not started")

    def start(self) -> None:
        self._first = self._read()

    def stop(self) -> Reading:
        last = self._read()
        wraps = None if last.reason else [float((z / "max_energy_range_uj").read_text()) / 1e6 for z in self._zones]
        return difference(self._first, last, "package", wraps)

    def _read(self) -> Counter:
        if not self._zones:
            return Counter((), self._clock(), "no RAPL counter on this machine")
        try:
            joules = tuple(float((zone / "energy_uj").read_text()) / 1e6 for zone in self._zones)
        except PermissionError:
            return Counter((), self._clock(), "RAPL counters are readable by root alone")
        except OSError as error:
            return Counter((), self._clock(), f"RAPL counters cannot be read: {error}")
        return Counter(joules, self._clock())


def _rapl_zones(root: Path) -> list[Path]:
    """Package zones and their `dram` sub-zones (core sub-zones are part of the package)."""
    packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    found = []
    for package in packages:
        found.append(package)
        for zone in sorted(package.glob("intel-rapl:*:*")):
            name = zone / "name"
            if name.is_file() and name.read_text().strip() == "dram":
                found.append(zone)
    return found
