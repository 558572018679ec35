"""RaplMeter: processor packages and their memory through Linux powercap.

The counters are of whole packages, with every process on them. They are readable by root alone on most systems
(CVE-2020-8694), in a container only through a bind mount, in a virtual machine hardly ever; then the reading says so.
They start again from zero after minutes at full power: while a window is open a thread counts these wraps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autopar.meters.reading import Counter, Reading, difference, joined, unknown

RAPL_ROOT = Path("/sys/class/powercap")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SHARED = "of whole packages, whoever uses them"
POLL_PERIOD_S = 1.0
MOST_PACKAGE_W = 1000.0
"""No package draws more: how soon a counter can have gone all the way round unseen."""


class RaplMeter:
    """See the module docstring.

    Args:
        root: of the powercap tree.
        clock: seconds.
        period_s: between two looks at the counters.
    """

    def __init__(
        self,
        root: Path = RAPL_ROOT,
        clock: Callable[[], float] = time.perf_counter,
        period_s: float = POLL_PERIOD_S,
    ) -> None:
        self._clock, self._period_s = clock, period_s
        self._zones, self._has_memory = _zones(root)
        self._lock = threading.Lock()
        self._last: list[float] = []
        self._sums: list[float] = []
        self._ranges: list[float] = []
        self._looked_at = 0.0
        self._reason = "the meter was not started"
        self._began = clock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Identities of the counters: of this machine since it booted, whatever it calls itself."""
        boot = BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.is_file() else ""
        return tuple(f"{zone.name} {boot}".strip() for zone in self._zones)

    def start(self) -> None:
        """Open a window."""
        self._end_thread()
        self._began = self._looked_at = self._clock()
        self._reason = "" if self._zones else "no RAPL counter on this machine (or none in this container)"
        try:
            self._last = [] if self._reason else self._read("energy_uj")
            self._ranges = [] if self._reason else self._read("max_energy_range_uj")
        except (OSError, ValueError) as error:
            self._reason = _refusal(error)
            return
        self._sums = [0.0] * len(self._last)
        if not self._reason:
            self._stopped = threading.Event()
            self._thread = threading.Thread(target=self._poll, daemon=True, name="rapl-poll")
            self._thread.start()

    def stop(self) -> Reading:
        """Close the window."""
        self._end_thread()
        if not self._reason:
            self._look()
        now = self._clock()
        if self._reason:
            return unknown(self._reason, now - self._began, "package", self.devices)
        zeros = Counter((0.0,) * len(self._sums), self._began)
        names = [zone.name for zone in self._zones]
        reading = difference(zeros, Counter(tuple(self._sums), now), "package", names)
        missing = "" if self._has_memory else "memory has no counter of its own here"
        return replace(reading, reason=joined(reading.reason, SHARED, missing), devices=self.devices)

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _poll(self) -> None:
        period_s = min(self._period_s, min(self._ranges) / MOST_PACKAGE_W / 4)
        while not self._stopped.wait(period_s):
            self._look()

    def _look(self) -> None:
        """Add what the counters have grown by since the last look."""
        with self._lock:
            if self._reason:
                return
            try:
                found = self._read("energy_uj")
            except (OSError, ValueError) as error:
                self._reason = _refusal(error)
                return
            now = self._clock()
            if now - self._looked_at > min(self._ranges) / MOST_PACKAGE_W:
                self._reason = f"RAPL counters went unseen for {now - self._looked_at:.0f} s and may have wrapped"
                return
            for index, (old, new, most) in enumerate(zip(self._last, found, self._ranges, strict=True)):
                self._sums[index] += new - old if new >= old else new - old + most
            self._last, self._looked_at = found, now

    def _read(self, name: str) -> list[float]:
        """One number of every zone, in joules."""
        return [float((zone / name).read_text(encoding="ascii")) / 1e6 for zone in self._zones]


def _refusal(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "RAPL counters are readable by root alone"
    return f"RAPL counters cannot be read: {error}"


def _zones(root: Path) -> tuple[list[Path], bool]:
    """Package zones and their `dram` sub-zones, and whether there are any of the latter.

    Core sub-zones are part of the package, and the zone `psys` (the whole platform) contains the packages.
    """
    found: list[Path] = []
    has_memory = False
    for package in sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1):
        if not _name(package).startswith("package"):
            continue
        found.append(package)
        memory = [zone for zone in sorted(package.glob("intel-rapl:*:*")) if _name(zone) == "dram"]
        has_memory = has_memory or bool(memory)
        found += memory
    return found, has_memory


def _name(zone: Path) -> str:
    path = zone / "name"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
