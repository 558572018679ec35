"""Pace: keeps the starts of two steps apart, as a plan under an average power cap needs."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pacer:
    """`wait` returns once `pace_s` seconds have passed since it last returned; at once the first time."""

    def __init__(
        self,
        pace_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Start; `clock` and `sleep` count seconds."""
        self.pace_s = pace_s
        self._clock, self._sleep = clock, sleep
        self._begun_s: float | None = None

    def wait(self) -> None:
        """Wait, and note that a step begins."""
        if self.pace_s <= 0:
            return
        if self._begun_s is not None:
            while (left_s := self._begun_s + self.pace_s - self._clock()) > 0:
                self._sleep(left_s)
        self._begun_s = self._clock()
