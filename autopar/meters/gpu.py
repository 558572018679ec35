"""NvmlMeter: energy of some GPUs of this node.

Ladder: difference of the energy counter; where that cannot be used, the integral of power samples taken meanwhile. Both
run side by side: a counter that says more than the boards can draw is not believed, and how far the two differ stands
in the reading (reference cases: within 1 % in one study, 187 against 327 J over 5 idle seconds in a bug report).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autopar.meters.reading import COUNTER_STEP_S, Counter, Reading, difference, joined, unknown
from autopar.meters.sampler import LONGEST_GAP_S, SAMPLE_PERIOD_S, Integral, PowerSampler
from autopar.meters.visible import find_boards
from autopar.nvml import Board, Nvml, NvmlError, Power, open_nvml

MOST_OVER_LIMIT = 1.5
"""Boards were seen at 1.2 times their rated power; an average beyond this is a fault of the counter."""
WORTH_TELLING = 0.1
"""Relative disagreement of counter and integrated power from which a reading is doubtful."""


class NvmlMeter:
    """Board energy of some GPUs through NVML.

    Args:
        wanted: NVML indices, or identifiers `GPU-...` and `MIG-...`; all GPUs if None. A GPU named twice counts once.
        nvml: the binding (`pynvml`), given by tests; imported when the meter is opened.
        clock: seconds.
        period_s: between two power samples.
    """

    def __init__(
        self,
        wanted: Sequence[int | str] | None = None,
        nvml: Any = None,
        clock: Callable[[], float] = time.perf_counter,
        period_s: float = SAMPLE_PERIOD_S,
    ) -> None:
        self._binding, self._wanted, self._clock, self._period_s = nvml, wanted, clock, period_s
        self._nvml: Nvml | None = None
        self._boards: tuple[Board, ...] = ()
        self._limit_w: float | None = None
        self._reason = "the meter is not open"
        self._shared = ""
        self._first = Counter((), 0.0, "the meter was not started")
        self._sampler: PowerSampler | None = None

    def __enter__(self) -> NvmlMeter:
        """Opens NVML. A failure is no error: it becomes the reason of every reading."""
        try:
            self._nvml = open_nvml(self._binding)
            found = self._nvml.boards() if self._wanted is None else find_boards(self._nvml, self._wanted)
        except NvmlError as error:
            self._reason = str(error) if error.kind == "missing" else f"NVML cannot be opened: {error}"
            return self
        self._boards = tuple({board.uuid: board for board in found}.values())
        self._reason = "" if self._boards else "NVML finds no GPU"
        self._limit_w = self._limit()
        self._shared = joined(*map(_shared, self._boards))
        return self

    def __exit__(self, *_: object) -> None:
        if self._sampler is not None:
            self._sampler.finish()
            self._sampler = None
        if self._nvml is not None:
            self._nvml.close()
        self._nvml, self._boards, self._reason = None, (), "the meter is not open"

    @property
    def devices(self) -> tuple[str, ...]:
        """Names and identifiers of the GPUs."""
        return tuple(f"{board.name} {board.uuid}" for board in self._boards)

    def start(self) -> None:
        """Open a window."""
        if self._sampler is not None:
            self._sampler.finish()
        self._first = self._read()
        self._sampler = PowerSampler(self._power, self._clock, self._period_s) if self._boards else None
        if self._sampler is not None:
            self._sampler.begin()

    def stop(self) -> Reading:
        """Close the window."""
        last = self._read()
        integral = None if self._sampler is None else self._sampler.finish()
        self._sampler = None
        counted = self._within_reach(difference(self._first, last, "gpu", [board.uuid for board in self._boards]))
        reading = counted if integral is None else _best(counted, integral)
        return replace(reading, reason=joined(reading.reason, self._shared), devices=self.devices)

    def _limit(self) -> float | None:
        """Power limits of all boards together."""
        try:
            return sum(board.power_limit_w() for board in self._boards)
        except NvmlError:
            return None

    def _within_reach(self, counted: Reading) -> Reading:
        """The reading, or none if the boards cannot have drawn that much."""
        if counted.value_j is None or self._limit_w is None or counted.window_s < 2 * COUNTER_STEP_S:
            return counted
        watts = (counted.low_j or 0.0) / counted.window_s
        if watts <= MOST_OVER_LIMIT * self._limit_w:
            return counted
        reason = f"the energy counter says {watts:.0f} W of boards limited to {self._limit_w:.0f} W"
        return unknown(reason, counted.window_s, "gpu")

    def _read(self) -> Counter:
        if self._reason:
            return Counter((), self._clock(), self._reason)
        try:
            joules = tuple(board.energy_j() for board in self._boards)
        except NvmlError as error:
            return Counter((), self._clock(), f"no energy counter: {error}")
        return Counter(joules, self._clock())

    def _power(self) -> Power | None:
        """Present power of all GPUs, None if it cannot be read."""
        try:
            found = [board.power() for board in self._boards]
        except NvmlError:
            return None
        averages = {power.is_average for power in found}
        scope = "module" if any(power.scope == "module" for power in found) else "gpu"
        return Power(sum(power.watts for power in found), averages.pop() if len(averages) == 1 else None, scope)


def _shared(board: Board) -> str:
    """What the board's counters hold besides this run."""
    if board.is_divided():
        return f"GPU {board.index} is divided by MIG: the figure is of the whole board, shared with other instances"
    if board.is_virtual():
        return f"GPU {board.index} is virtual: the figure may be of the whole board, shared with other machines"
    return ""


def _best(counted: Reading, integral: Integral) -> Reading:
    """The counter's reading checked against integrated power, or the latter where there is none to trust."""
    summed = integral.reading
    if counted.value_j is None:
        if summed.value_j is None:
            return unknown(joined(counted.reason, f"{summed.reason} either"), counted.window_s, "gpu")
        if integral.is_frozen and "did not move" in counted.reason:
            return unknown(joined(counted.reason, "nor did the power reading"), counted.window_s, "gpu")
        return replace(summed, reason=joined(counted.reason, summed.reason))
    is_alike = summed.scope == counted.scope and integral.gap_s <= LONGEST_GAP_S
    if summed.value_j is None or not is_alike:
        return counted
    disagreement = summed.value_j / counted.value_j - 1
    slack = WORTH_TELLING + 2 * COUNTER_STEP_S / counted.window_s
    if abs(disagreement) <= slack:
        return replace(counted, disagreement=disagreement)
    return replace(
        counted,
        disagreement=disagreement,
        low_j=min(counted.low_j or 0.0, summed.value_j),
        high_j=max(counted.high_j or 0.0, summed.value_j),
        reason=joined(counted.reason, f"integrated power says {summed.value_j:.4g} J, {disagreement:+.0%}"),
    )
