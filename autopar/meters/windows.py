"""Windows: repeating work until its energy can be told, by rules that keep a window from fooling its reader.

A window shorter than 2 s scatters and reads low (the chip is cold), trials back to back read high (leakage of a hot
one), and the sensors of some boards see a quarter of the time only: so work is warmed up first, repeated for whole
windows with a rest in between, and each window begins at another phase of the sensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from autopar.meters.reading import COUNTER_STEP_S, EnergyMeter, Reading, joined, unknown


@dataclass(frozen=True, slots=True)
class WindowRules:
    """How to measure repeated work.

    Attributes:
        window_s: least length of each window.
        trials: windows, of which the median counts; >= 1.
        warm_up_s: work before the first window.
        cool_down_s: rest before every window but the first.
    """

    window_s: float = 5.0
    trials: int = 3
    warm_up_s: float = 1.0
    cool_down_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Repeated:
    """Energy and time of one run of the work.

    Attributes:
        reading: of one run; its bounds hold every trial's. Its window is that of the middle trial.
        time_s: of one run, median over trials.
        count: runs measured in all.
        spread: (highest - lowest) / median energy over the trials; 0 of one.
    """

    reading: Reading
    time_s: float
    count: int
    spread: float


def measure_repeated(
    run: Callable[[], object],
    meter: EnergyMeter,
    rules: WindowRules,
    *,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Repeated:
    """Repeat `run` for whole windows. A single unknown window makes the energy unknown, never the time."""
    began = clock()
    while clock() - began < rules.warm_up_s:
        run()
        synchronise()
    readings: list[Reading] = []
    times: list[float] = []
    total = 0
    for trial in range(rules.trials):
        if trial:
            sleep(rules.cool_down_s + trial * COUNTER_STEP_S / rules.trials)
        count, seconds, reading = _window(run, meter, rules.window_s, synchronise, clock)
        total += count
        times.append(seconds / count)
        readings.append(_per_run(reading, count))
    return _middle(readings, statistics.median(times), total)


def power_at_rest(
    meter: EnergyMeter, rules: WindowRules, *, sleep: Callable[[float], None] = time.sleep
) -> tuple[float | None, str]:
    """Watts while nothing runs, over one window after a rest; None and the reason if the meter does not know."""
    sleep(rules.cool_down_s)
    meter.start()
    sleep(rules.window_s)
    reading = meter.stop()
    return (None, reading.reason) if reading.value_j is None else (reading.value_j / reading.window_s, reading.reason)


def _window(
    run: Callable[[], object],
    meter: EnergyMeter,
    window_s: float,
    synchronise: Callable[[], None],
    clock: Callable[[], float],
) -> tuple[int, float, Reading]:
    synchronise()
    meter.start()
    began, count = clock(), 0
    while not count or clock() - began < window_s:
        run()
        synchronise()
        count += 1
    seconds = clock() - began
    return count, seconds, meter.stop()


def _per_run(reading: Reading, count: int) -> Reading:
    shares = [None if value is None else value / count for value in (reading.value_j, reading.low_j, reading.high_j)]
    return replace(reading, value_j=shares[0], low_j=shares[1], high_j=shares[2])


def _middle(readings: list[Reading], time_s: float, total: int) -> Repeated:
    for reading in readings:
        if reading.value_j is None:
            return Repeated(unknown(reading.reason, reading.window_s, reading.scope), time_s, total, 0.0)
    ranked = sorted(readings, key=lambda reading: reading.value_j or 0.0)
    middle = ranked[(len(ranked) - 1) // 2]
    values = [reading.value_j or 0.0 for reading in ranked]
    spread = (values[-1] - values[0]) / (middle.value_j or 1.0)
    lows = [reading.value_j if reading.low_j is None else reading.low_j for reading in ranked]
    highs = [reading.value_j if reading.high_j is None else reading.high_j for reading in ranked]
    return Repeated(
        replace(
            middle,
            low_j=min(low for low in lows if low is not None),
            high_j=max(high for high in highs if high is not None),
            reason=joined(*(reading.reason for reading in readings)),
        ),
        time_s,
        total,
        spread,
    )
