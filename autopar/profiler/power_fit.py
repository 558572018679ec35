"""Fits of time and power by clock, from a handful of clocks.

    t(f) = a + b / f                                   a: memory and fixed part, b / f: computing
    P(f) = P0 + k f V^2 ,  V = 1 + s (f - f_r)+        f_r: the ridge, below which the voltage is the least

Both hold below the power limit only: where the board reaches it, the clock is not the one that was asked for, so such
samples bound the fit and do not shape it. Source of the forms: dynamic power of CMOS; they follow 38 clocks of four
pipeline stages on A100 within about 1 % (Perseus artifact), which is why about five clocks are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.errors import ProfileError
from autopar.ir.cost import Array

LEAST_SAMPLES = 4
"""Below the limit: as many as power has parameters."""
RIDGES, RISES = 161, 321
"""Trials of the ridge and of the voltage's rise; with half as many, five clocks left it open (4 % off)."""
MOST_RISE = 1.0
"""Voltage at the highest clock over the least, less 1."""
CAPPED_SHARE = 0.97
"""Of the limit: from there on the clock may have been lowered."""


@dataclass(frozen=True, slots=True)
class ClockSample:
    """Work at one clock: seconds of a run, and watts while it runs."""

    clock_hz: float
    time_s: float
    power_w: float


@dataclass(frozen=True, slots=True)
class TimeFit:
    """`fixed_s` + `cycles` / f. `error`: mean relative error over the samples."""

    fixed_s: float
    cycles: float
    error: float

    def time_s(self, clock_hz: float) -> float:
        """At a clock."""
        return self.fixed_s + self.cycles / clock_hz


@dataclass(frozen=True, slots=True)
class PowerFit:
    """See the module docstring. `error`: mean relative error over the samples.

    Attributes:
        base_w: P0.
        w_per_hz: k.
        ridge_hz: f_r.
        rise_per_hz: s.
    """

    base_w: float
    w_per_hz: float
    ridge_hz: float
    rise_per_hz: float
    error: float

    def voltage(self, clock_hz: float) -> float:
        """Over the least one."""
        return 1 + self.rise_per_hz * max(0.0, clock_hz - self.ridge_hz)

    def power_w(self, clock_hz: float) -> float:
        """At a clock that the board holds."""
        return self.base_w + self.w_per_hz * clock_hz * self.voltage(clock_hz) ** 2

    def clock_within(self, limit_w: float, highest_hz: float) -> float:
        """Highest clock, at most `highest_hz`, whose power keeps the limit; 0 if none does."""
        if self.power_w(highest_hz) <= limit_w:
            return highest_hz
        low, high = 0.0, highest_hz
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.power_w(middle) <= limit_w else (low, middle)
        return low


def below_limit(samples: Sequence[ClockSample], limit_w: float) -> list[ClockSample]:
    """Samples whose clock the limit has not touched."""
    return [sample for sample in samples if sample.power_w < CAPPED_SHARE * limit_w]


def fit_time(samples: Sequence[ClockSample]) -> TimeFit:
    """Least squares of relative errors, neither part negative. Raises ProfileError for fewer than two clocks."""
    if len({sample.clock_hz for sample in samples}) < 2:
        raise ProfileError("time by clock needs at least two clocks below the power limit")
    inverse, times = (np.array([getattr(s, name) for s in samples]) for name in ("clock_hz", "time_s"))
    inverse = 1 / inverse
    ways = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]
    fits = []
    for fixed, cycles in ways:
        columns = np.stack([np.full_like(inverse, fixed), cycles * inverse], axis=1) / times[:, None]
        found = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)[0] * (fixed, cycles)
        error = float(np.mean(np.abs(found[0] + found[1] * inverse - times) / times))
        if min(found) >= 0:
            fits.append(TimeFit(float(found[0]), float(found[1]), error))
    return min(fits[:1] or fits, key=lambda fit: fit.error)


def fit_power(samples: Sequence[ClockSample], highest_hz: float) -> PowerFit:
    """Least squares of relative errors over base and slope, for the best ridge and rise of a grid.

    Raises:
        ProfileError: fewer than four clocks, or power that does not grow with them.
    """
    clocks = np.array([sample.clock_hz for sample in samples])
    watts = np.array([sample.power_w for sample in samples])
    if len(set(clocks.tolist())) < LEAST_SAMPLES:
        raise ProfileError(
            f"power by clock needs {LEAST_SAMPLES} clocks below the power limit, found {len(set(clocks))}"
        )
    ridges = np.linspace(clocks.min(), highest_hz, RIDGES, endpoint=False)
    best: tuple[float, PowerFit] | None = None
    for ridge in ridges:
        rises = np.linspace(0.0, MOST_RISE, RISES) / (highest_hz - ridge)
        voltage = 1 + rises[:, None] * np.maximum(0.0, clocks - ridge)
        errors, base, slope = _solve(clocks * voltage**2, watts)
        index = int(np.argmin(errors))
        if np.isfinite(errors[index]) and (best is None or errors[index] < best[0]):
            fit = PowerFit(float(base[index]), float(slope[index]), float(ridge), float(rises[index]), 0.0)
            best = float(errors[index]), fit
    if best is None:
        raise ProfileError("power does not grow with the clock: is the clock locked, and the GPU alone?")
    fit = best[1]
    error = float(np.mean([abs(fit.power_w(f) - w) / w for f, w in zip(clocks, watts, strict=True)]))
    return PowerFit(fit.base_w, fit.w_per_hz, fit.ridge_hz, fit.rise_per_hz, error)


def _solve(drive: Array, watts: Array) -> tuple[Array, Array, Array]:
    """Sum of squared relative errors, base and slope for every row of `drive` (f V^2); inf if either is negative.

    A regression of watts on drive with weights 1 / watts^2.
    """
    weights = 1 / watts**2
    total = weights.sum()
    mean_drive = (drive * weights).sum(axis=1) / total
    mean_watts = float((watts * weights).sum() / total)
    centred = drive - mean_drive[:, None]
    spread = (weights * centred**2).sum(axis=1)
    slope = (weights * centred * (watts - mean_watts)).sum(axis=1) / spread
    base = mean_watts - slope * mean_drive
    errors = (weights * (base[:, None] + slope[:, None] * drive - watts) ** 2).sum(axis=1)
    return np.where((base >= 0) & (slope > 0), errors, np.inf), base, slope
