"""Measuring what a GPU draws: idle, blocked, computing and streaming, at a few clocks; numbers of a device file.

    idle      before this process has a context on the GPU
    blocked   a live context and nothing to do: what pipeline bubbles and waiting in collectives cost
    product   large matrix products;  stream: copies within device memory

From `profiler.power_fit`, with P the power of products, f_max the highest clock, d = (blocked - P0) / (P(f_max) -
blocked), and so on: the parameters in which `cost.power` writes the same curve. Where clocks may not be set, everything
is measured at the clock that the GPU chooses, and the curve of the device file stays.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.errors import ProfileError
from autopar.ir.profile import MeasuredNumber
from autopar.meters import Repeated
from autopar.profiler.power_fit import ClockSample, PowerFit, TimeFit, below_limit, fit_power, fit_time

LEAST = 1e-3
"""Numbers of a device file are above zero: stands for a share that is measured as none."""
ABOVE, BELOW = (1.0, 0.72, 0.38), (0.06, 0.23)
"""Where to measure: so far from the ridge to the highest clock, and so far below the ridge by shares of the highest."""
ENOUGH_CLOCKS, MOST_CLOCKS = 5, 9
"""Clocks free of the power limit that are wanted, and clocks measured for it at most."""
USUAL_RIDGE = 0.77
"""Share of the highest clock; A100 (Perseus artifact)."""


@dataclass(frozen=True)
class PowerBench:
    """One GPU and the work to draw power with.

    Attributes:
        idle_w, blocked_w: watts, or None if the meter does not know.
        product, stream: measure repeated work at the present clock.
        at_clock: holds the GPU at a clock; yields the clock in Hz, or None where it may not be set.
        clock_hz: present clock, asked for under load.
        clocks_hz: that the driver accepts, highest first; () if it does not tell.
        limit_w: power limit that is set.
        device: for the sources of numbers.
    """

    idle_w: float | None
    blocked_w: float | None
    product: Callable[[], Repeated]
    stream: Callable[[], Repeated]
    at_clock: Callable[[float], contextlib.AbstractContextManager[float | None]]
    clock_hz: Callable[[], float]
    clocks_hz: tuple[float, ...]
    limit_w: float
    device: str


@dataclass(frozen=True)
class PowerProfile:
    """Numbers of the device, the fits behind them (None: at one clock only), and what the reader must know."""

    numbers: tuple[MeasuredNumber, ...]
    time: TimeFit | None
    power: PowerFit | None
    notes: tuple[str, ...]


def clocks_to_measure(clocks_hz: Sequence[float], ridge_share: float = USUAL_RIDGE) -> tuple[float, ...]:
    """About five of the accepted clocks: the highest, two above the ridge, one just below it and one well below."""
    if not clocks_hz:
        return ()
    highest = max(clocks_hz)
    shares = [ridge_share + part * (1 - ridge_share) for part in ABOVE] + [ridge_share - part for part in BELOW]
    wanted = [highest * share for share in shares]
    nearest = {min(clocks_hz, key=lambda clock: (abs(clock - hz), clock)) for hz in wanted}
    return tuple(sorted(nearest, reverse=True))


def measure_power(bench: PowerBench, ridge_share: float = USUAL_RIDGE) -> PowerProfile:
    """Measure at every clock that may be set, else at the present one."""
    products: list[ClockSample] = []
    streams: list[ClockSample] = []
    notes: list[str] = []
    todo = list(clocks_to_measure(bench.clocks_hz, ridge_share))
    while todo:
        with bench.at_clock(todo.pop(0)) as held_hz:
            if held_hz is None:
                break
            for samples, work in ((products, bench.product), (streams, bench.stream)):
                sample = _sample(held_hz, work())
                if isinstance(sample, str):
                    return PowerProfile(_statics(bench), None, None, (f"power is not measured: {sample}",))
                samples.append(sample)
        if not todo and len(products) < MOST_CLOCKS:
            todo += _below_limit_too(bench, products)
    if len(products) >= 2:
        try:
            return _by_clock(bench, products, streams)
        except ProfileError as error:
            notes.append(f"no curve of power by clock: {error}")
    return _at_present(bench, notes)


def _below_limit_too(bench: PowerBench, products: Sequence[ClockSample]) -> list[float]:
    """One more clock in the widest gap below the lowest that the limit touched, while too few are free of it."""
    free = sorted(sample.clock_hz for sample in below_limit(products, bench.limit_w))
    touched = [sample.clock_hz for sample in products if sample.clock_hz not in free]
    if not free or len(free) >= ENOUGH_CLOCKS or not touched:
        return []
    gaps = list(itertools.pairwise([*free, min(touched)]))
    low, high = max(gaps, key=lambda gap: gap[1] - gap[0])
    inside = [clock for clock in bench.clocks_hz if low < clock < high]
    return [min(inside, key=lambda clock: abs(clock - (low + high) / 2))] if inside else []


def _sample(clock_hz: float, found: Repeated) -> ClockSample | str:
    """Watts over the run, or why they are unknown."""
    if found.reading.value_j is None:
        return found.reading.reason
    return ClockSample(clock_hz, found.time_s, found.reading.value_j / found.time_s)


def _statics(bench: PowerBench) -> tuple[MeasuredNumber, ...]:
    found = []
    if bench.idle_w is not None:
        found.append(MeasuredNumber("power.idle_w", bench.idle_w, "W", f"{bench.device}, without a context"))
    if bench.blocked_w is not None:
        found.append(MeasuredNumber("power.blocked_w", bench.blocked_w, "W", f"{bench.device}, context, nothing to do"))
    if found:
        found.append(MeasuredNumber("power.limit_w", bench.limit_w, "W", f"{bench.device}, limit set in the driver"))
    return tuple(found)


def _at_present(bench: PowerBench, notes: list[str]) -> PowerProfile:
    """Shares of the limit at the clock that the GPU chooses."""
    found = [_sample(bench.clock_hz(), work()) for work in (bench.product, bench.stream)]
    clock_hz = bench.clock_hz()
    watts = [sample.power_w for sample in found if isinstance(sample, ClockSample)]
    if len(watts) < len(found) or bench.blocked_w is None:
        reason = next((sample for sample in found if isinstance(sample, str)), "blocked power is unknown")
        return PowerProfile(_statics(bench), None, None, (*notes, f"power is not measured: {reason}"))
    source = f"{bench.device}, at the clock that it chose ({clock_hz / 1e6:.0f} MHz) only"
    numbers = _shares(bench, bench.blocked_w, watts[0], watts[1], source)
    notes.append(f"power is measured at {clock_hz / 1e6:.0f} MHz only; its curve by clock is the device file's")
    return PowerProfile((*_statics(bench), *numbers), None, None, tuple(notes))


def _shares(
    bench: PowerBench, blocked_w: float, product_w: float, stream_w: float, source: str
) -> tuple[MeasuredNumber, ...]:
    room_w = bench.limit_w - blocked_w
    return tuple(
        MeasuredNumber(f"power.{name}", min(1.0, max(LEAST, (watts - blocked_w) / room_w)), "1", source)
        for name, watts in (("gemm_share", product_w), ("memory_share", stream_w))
    )


def _by_clock(bench: PowerBench, products: list[ClockSample], streams: list[ClockSample]) -> PowerProfile:
    """All numbers of the curve. Raises ProfileError if it cannot be fitted."""
    if bench.blocked_w is None:
        raise ProfileError("blocked power is unknown")
    free = below_limit(products, bench.limit_w)
    highest_hz, blocked_w = max(bench.clocks_hz), bench.blocked_w
    time, power = fit_time(free), fit_power(free, highest_hz)
    sustained_hz = power.clock_within(bench.limit_w, highest_hz)
    top_w = power.power_w(highest_hz)
    if top_w <= blocked_w or sustained_hz <= 0:
        raise ProfileError("products draw no more than waiting does: is the GPU alone?")
    shown = f"{min(s.clock_hz for s in products) / 1e6:.0f}-{highest_hz / 1e6:.0f} MHz"
    source = f"{bench.device}, products at {len(free)} clocks of {shown}, within {power.error:.1%}"
    blocked_share = max(LEAST, (blocked_w - power.base_w) / (top_w - blocked_w))
    steps = sorted(bench.clocks_hz)
    step_hz = min((b - a for a, b in itertools.pairwise(steps)), default=highest_hz)
    curve = {
        "clock.max_hz": (highest_hz, "Hz"),
        "clock.min_hz": (steps[0], "Hz"),
        "clock.step_hz": (step_hz, "Hz"),
        "clock.ridge_share": (power.ridge_hz / highest_hz, "1"),
        "clock.voltage_rise": (max(LEAST, power.voltage(highest_hz) - 1), "1"),
        "clock.blocked_share": (blocked_share, "1"),
        "clock.sustained_share": (sustained_hz / highest_hz, "1"),
        "power.memory_clock_share": (_memory_share(bench, power, streams, sustained_hz), "1"),
    }
    numbers = [MeasuredNumber(path, value, unit, source) for path, (value, unit) in curve.items()]
    stream_w = max(streams, key=lambda sample: sample.clock_hz).power_w
    shares = _shares(bench, blocked_w, power.power_w(sustained_hz), stream_w, source)
    notes = [f"time of products by clock: {time.cycles / highest_hz / time.time_s(highest_hz):.0%} follows it, "
             f"within {time.error:.1%}; their power within {power.error:.1%}"]  # fmt: skip
    if len(free) < len(products):
        notes.append(
            f"at {len(products) - len(free)} of {len(products)} clocks the power limit held: left out of the fit"
        )
    return PowerProfile((*_statics(bench), *shares, *numbers), time, power, tuple(notes))


def _memory_share(bench: PowerBench, power: PowerFit, streams: list[ClockSample], sustained_hz: float) -> float:
    """Share of a stream's dynamic power that follows the clock as a product's does: a line through its samples."""
    blocked_w = bench.blocked_w or 0.0
    drive = [(power.power_w(s.clock_hz) - blocked_w) / (power.power_w(sustained_hz) - blocked_w) for s in streams]
    watts = [sample.power_w - blocked_w for sample in streams]
    mean_x, mean_y = sum(drive) / len(drive), sum(watts) / len(watts)
    spread = sum((x - mean_x) ** 2 for x in drive)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(drive, watts, strict=True)) / spread if spread else 0.0
    whole = mean_y + slope * (1 - mean_x)
    return min(1.0, max(LEAST, slope / whole)) if whole > 0 else LEAST
