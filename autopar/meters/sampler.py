"""PowerSampler: integrates power over a window by samples that a thread takes, and tells how far to trust the sum."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

from autopar.meters.reading import MIN_WINDOW_S, Reading, joined, unknown
from autopar.nvml import Power

SAMPLE_PERIOD_S = 0.05
LONGEST_GAP_S = 0.5
"""Samples further apart than this miss too much to check a counter against."""
INSTANT_ERROR, AVERAGE_ERROR = 0.1, 0.2
"""Assumed relative errors of the integral (reference: up to 35 % on boards whose sensor sees a quarter of the time)."""


@dataclass(frozen=True, slots=True)
class Integral:
    """What the samples say.

    Attributes:
        gap_s: longest time between two of them.
        is_frozen: all are equal to the last digit, as no live sensor's are.
    """

    reading: Reading
    gap_s: float
    is_frozen: bool


class PowerSampler:
    """Samples power from `begin` to `finish` and integrates by trapezoids.

    Args:
        power: present power of all devices together; None if it cannot be read.
        clock: seconds.
        period_s: between two samples.
    """

    def __init__(
        self, power: Callable[[], Power | None], clock: Callable[[], float], period_s: float = SAMPLE_PERIOD_S
    ) -> None:
        self._power = power
        self._clock = clock
        self._period_s = period_s
        self._samples: list[tuple[float, Power]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="power-sampler")
        self._began = 0.0

    def begin(self) -> None:
        """Open the window."""
        self._began = self._clock()
        self._take()
        self._thread.start()

    def finish(self) -> Integral:
        """Close the window."""
        self._stopped.set()
        self._thread.join()
        self._take()
        window_s = self._clock() - self._began
        if len(self._samples) < 2:
            return Integral(unknown("power cannot be read", window_s, "gpu"), window_s, True)
        pairs = list(itertools.pairwise((at_s, power.watts) for at_s, power in self._samples))
        joules = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)
        gap_s = max(b[0] - a[0] for a, b in pairs)
        watts = {power.watts for _, power in self._samples}
        if joules <= 0:
            return Integral(unknown("power reads zero", window_s, "gpu"), gap_s, True)
        return Integral(self._reading(joules, window_s, gap_s), gap_s, len(self._samples) > 2 and len(watts) == 1)

    def _reading(self, joules: float, window_s: float, gap_s: float) -> Reading:
        last = self._samples[-1][1]
        reasons = [
            "power is a 1 s average" if last.is_average else "",
            "power may be a 1 s average" if last.is_average is None else "",
            "window below 1 s" if window_s < MIN_WINDOW_S else "",
            f"power samples up to {gap_s:.1f} s apart" if gap_s > LONGEST_GAP_S else "",
        ]
        error = INSTANT_ERROR if last.is_average is False and not any(reasons) else AVERAGE_ERROR
        low, high = (1 - error) * joules, (1 + error) * joules
        return Reading(joules, "measured", "integrated", last.scope, window_s, low, high, joined(*reasons))

    def _run(self) -> None:
        while not self._stopped.wait(self._period_s):
            self._take()

    def _take(self) -> None:
        power = self._power()
        if power is not None:
            self._samples.append((self._clock(), power))
