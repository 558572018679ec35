"""Steps of a paced plan begin at least `pace_s` apart, on a clock that only the test moves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from autopar.runtime.pace import Pacer


@dataclass
class FakeClock:
    """Sleeping moves it, by half of what was asked for: real sleeps may end early too."""

    now_s: float = 100.0
    slept: list[float] = field(default_factory=list)

    def read(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now_s += max(seconds / 2, 1e-3)


def test_starts_are_a_pace_apart() -> None:
    clock = FakeClock()
    pacer = Pacer(2.0, clock.read, clock.sleep)
    starts = []
    for work_s in (0.5, 1.9, 0.0, 3.0, 0.1):
        pacer.wait()
        starts.append(clock.now_s)
        clock.now_s += work_s
    assert all(after - before >= 2.0 for before, after in itertools.pairwise(starts))
    assert starts[0] == 100.0
    assert starts[4] == starts[3] + 3.0


def test_without_a_pace_nothing_waits() -> None:
    clock = FakeClock()
    pacer = Pacer(0.0, clock.read, clock.sleep)
    for _ in range(3):
        pacer.wait()
    assert clock.slept == []
