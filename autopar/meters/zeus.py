"""ZeusMeter: the energy of GPUs by Zeus (`pip install zeus`), to check our own meter against. No dependency.

Zeus's monitor succeeds without a GPU and then reports an empty dictionary and a total of 0: here that is unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from autopar.meters.reading import Reading, doubt_of, unknown

WINDOW = "autopar"
INSTALL = "Zeus is not installed: pip install zeus"


class ZeusMeter:
    """Implements `EnergyMeter`.

    Args:
        indices: as CUDA counts; None: all GPUs.
        monitor: stands for `zeus.monitor.ZeusMonitor`, which is imported when the meter is made (it takes seconds).
    """

    def __init__(
        self,
        indices: Sequence[int] | None = None,
        monitor: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock, self._began = clock, clock()
        self._monitor: Any = None
        self._errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError)
        self._reason = ""
        self._is_open = False
        try:
            if monitor is None:
                monitor, error = _imported()
                self._errors = (*self._errors, error)
            self._monitor = monitor(gpu_indices=None if indices is None else list(indices))
        except ImportError as error:
            is_missing = (error.name or "zeus").partition(".")[0] == "zeus"
            self._reason = INSTALL if is_missing else f"Zeus cannot be imported: {error}"
        except self._errors as error:
            self._reason = f"Zeus cannot be opened: {error}"

    def start(self) -> None:
        """Open a window."""
        self._began = self._clock()
        if self._monitor is None:
            return
        try:
            if self._is_open:
                self._monitor.end_window(WINDOW, sync_execution=False)
            self._monitor.begin_window(WINDOW, sync_execution=False)
            self._is_open = True
        except self._errors as error:
            self._reason = f"Zeus cannot measure: {error}"

    def stop(self) -> Reading:
        """Close the window."""
        window_s = self._clock() - self._began
        if self._monitor is None or not self._is_open:
            return unknown(self._reason or "the meter was not started", window_s, "gpu")
        self._is_open = False
        try:
            found = self._monitor.end_window(WINDOW, sync_execution=False)
        except self._errors as error:
            return unknown(f"Zeus cannot measure: {error}", window_s, "gpu")
        joules = {int(index): float(value) for index, value in found.gpu_energy.items()}
        if not joules:
            return unknown("Zeus finds no GPU", window_s, "gpu")
        if any(value <= 0 for value in joules.values()):
            return unknown("Zeus reads no energy of a GPU", window_s, "gpu")
        devices = tuple(f"CUDA {index}" for index in sorted(joules))
        return Reading(
            sum(joules.values()), "measured", "zeus", "gpu", window_s, reason=doubt_of(window_s), devices=devices
        )


def _imported() -> tuple[Callable[..., Any], type[Exception]]:
    """The monitor, and the base of Zeus's own errors. Raises ImportError."""
    from zeus.exception import ZeusBaseError
    from zeus.monitor import ZeusMonitor

    return ZeusMonitor, ZeusBaseError
