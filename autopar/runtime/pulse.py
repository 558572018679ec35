"""Whether a run gets on, by the lines that its first rank prints at each step. Needs no torch.

A rank that hangs makes the others wait, and their wait has a limit. Where nobody waits, because there is one rank or
because all hang, the launcher must notice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

STEP = re.compile(r"step (?P<done>\d+)/(?P<last>\d+): ")
SLACK_S = 30.0
"""Beyond the limit of a collective, so that a rank that waited in one, and knows for whom, speaks first."""
FACTOR = 10.0
"""A step may take so many times longer than the longest before it, however short the limit."""


class Pulse:
    """See the module docstring."""

    def __init__(self, timeout_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """Nothing is expected before the second step: the first may take as long as it takes to compile.

        Args:
            timeout_s: of a collective.
            now_s: the clock, in seconds.
        """
        self._timeout_s, self._now_s = timeout_s, now_s
        self._times: list[float] = []
        self._longest_s = 0.0
        self._step = 0

    def hear(self, line: str) -> None:
        """Take note of a line that the first rank printed."""
        found = STEP.match(line)
        if found is None:
            return
        now = self._now_s()
        self._longest_s = max([self._longest_s, *(now - then for then in self._times[-1:])])
        self._times = [*self._times[-1:], now] if found["done"] != found["last"] else []
        self._step = int(found["done"])

    def fault(self) -> str:
        """Why the run counts as hung; "" as long as it does not."""
        if len(self._times) < 2:
            return ""
        silent_s = self._now_s() - self._times[-1]
        if silent_s <= max(self._timeout_s + SLACK_S, FACTOR * self._longest_s):
            return ""
        return (
            f"no step for {silent_s:.0f} s after step {self._step}, of which none took longer than "
            f"{self._longest_s:.3g} s: hung, in its code, its input or its device, or slower than --timeout allows"
        )
