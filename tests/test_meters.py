"""Meters with doubles: an unknown energy is never a zero."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from autopar.errors import InputError
from autopar.meters import Counter, NullMeter, NvmlMeter, RaplMeter, Reading, ReplayMeter, difference


class Clock:
    """Seconds that tests set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeNvml:
    """The part of `pynvml` that the meter calls. The counter steps every 100 ms, as on real boards.

    Attributes:
        watts: constant power of each GPU.
        broken: names of functions that raise.
        frozen: the counter stands still.
    """

    class NVMLError(Exception):
        """Base of the binding's errors."""

    def __init__(self, clock: Clock, watts: tuple[float, ...] = (300.0,), broken: tuple[str, ...] = ()) -> None:
        self.clock = clock
        self.watts = watts
        self.broken = broken
        self.frozen = False
        self.offset_j = 0.0
        self.is_open = False

    def _check(self, name: str, message: str = "Not Supported") -> None:
        if name in self.broken:
            raise self.NVMLError(message)

    def nvmlInit(self) -> None:  # noqa: N802 - the binding's name
        self._check("nvmlInit", "Insufficient Permissions")
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.watts)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        self._check("energy")
        steps = 0 if self.frozen else int((self.clock.now + 1e-9) / 0.1)
        return int(steps * 100 * self.watts[handle] + 1e3 * self.offset_j)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        self._check("power")
        return int(1e3 * self.watts[handle])


def measure(nvml: FakeNvml, clock: Clock, seconds: float) -> Reading:
    with NvmlMeter(nvml=nvml, clock=clock) as meter:
        meter.start()
        clock.now += seconds
        return meter.stop()


def test_counter_window_is_within_its_own_bounds() -> None:
    clock = Clock()
    clock.now = 100.03
    reading = measure(FakeNvml(clock, (300.0, 200.0)), clock, 5.04)
    assert (reading.label, reading.source, reading.scope) == ("measured", "counter", "gpu")
    assert reading.value_j == pytest.approx(500 * 5.04, rel=0.03)
    assert reading.low_j is not None
    assert reading.high_j is not None
    assert reading.low_j <= 500 * 5.04 <= reading.high_j
    assert reading.reason == ""


def test_window_below_a_second_is_marked() -> None:
    clock = Clock()
    assert "below 1 s" in measure(FakeNvml(clock), clock, 0.5).reason


def test_window_below_the_counter_step_is_unknown() -> None:
    clock = Clock()
    reading = measure(FakeNvml(clock), clock, 0.05)
    assert reading.value_j is None
    assert "shorter" in reading.reason


def test_frozen_counter_is_unknown_not_zero() -> None:
    clock = Clock()
    nvml = FakeNvml(clock)
    nvml.frozen = True
    reading = measure(nvml, clock, 5)
    assert (reading.value_j, reading.label) == (None, "unknown")
    assert "did not move" in reading.reason


def test_counter_that_runs_backwards_is_unknown() -> None:
    clock = Clock()
    nvml = FakeNvml(clock)
    with NvmlMeter(nvml=nvml, clock=clock) as meter:
        meter.start()
        clock.now += 5
        nvml.offset_j = -1e6
        reading = meter.stop()
    assert reading.value_j is None
    assert "backwards" in reading.reason


def test_missing_counter_falls_back_to_integrated_power_and_says_so() -> None:
    nvml = FakeNvml(Clock(), (300.0,), broken=("energy",))
    with NvmlMeter(nvml=nvml) as meter:
        meter.start()
        time.sleep(0.2)
        reading = meter.stop()
    assert (reading.label, reading.source) == ("measured", "integrated")
    assert reading.value_j == pytest.approx(300 * reading.window_s, rel=0.2)


def test_neither_counter_nor_power_is_unknown_with_both_reasons() -> None:
    nvml = FakeNvml(Clock(), broken=("energy", "power"))
    with NvmlMeter(nvml=nvml) as meter:
        meter.start()
        reading = meter.stop()
    assert reading.value_j is None
    assert "Not Supported" in reading.reason
    assert "power cannot be read" in reading.reason


def test_nvml_without_permission_is_unknown_with_the_reason() -> None:
    clock = Clock()
    reading = measure(FakeNvml(clock, broken=("nvmlInit",)), clock, 5)
    assert reading.value_j is None
    assert "Insufficient Permissions" in reading.reason


def test_machine_without_gpus_is_unknown() -> None:
    clock = Clock()
    assert "no GPU" in measure(FakeNvml(clock, ()), clock, 5).reason


def test_a_meter_that_is_not_open_or_not_started_knows_nothing() -> None:
    clock = Clock()
    meter = NvmlMeter(nvml=FakeNvml(clock), clock=clock)
    meter.start()
    assert "not open" in meter.stop().reason
    with NvmlMeter(nvml=FakeNvml(clock), clock=clock) as opened:
        assert "not started" in opened.stop().reason


def test_nvml_is_closed_again() -> None:
    clock = Clock()
    nvml = FakeNvml(clock)
    measure(nvml, clock, 5)
    assert not nvml.is_open


def test_binding_has_the_functions_that_the_double_has() -> None:
    import pynvml

    for name in dir(FakeNvml):
        if name.startswith("nvml"):
            create_autospec(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)


def test_nvml_is_not_imported_before_a_meter_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = NvmlMeter()
    with meter as opened:
        opened.start()
        assert "nvidia-ml-py" in opened.stop().reason


def zone(root: Path, name: str, kind: str, micro_joules: int) -> Path:
    path = root / name
    path.mkdir(parents=True)
    (path / "name").write_text(kind + "\n")
    (path / "energy_uj").write_text(f"{micro_joules}\n")
    (path / "max_energy_range_uj").write_text("1000000000\n")
    return path


def test_rapl_sums_packages_and_memory_and_counts_one_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    dram = zone(tmp_path, "intel-rapl:0/intel-rapl:0:1", "dram", 5_000_000)
    zone(tmp_path, "intel-rapl:0/intel-rapl:0:0", "core", 1)
    clock = Clock()
    meter = RaplMeter(tmp_path, clock)
    meter.start()
    clock.now += 2
    (package / "energy_uj").write_text("40000000")
    (dram / "energy_uj").write_text("8000000")
    reading = meter.stop()
    assert reading.value_j == pytest.approx(50 + 3)
    assert reading.scope == "package"


def test_rapl_absent_is_unknown(tmp_path: Path) -> None:
    meter = RaplMeter(tmp_path)
    meter.start()
    assert "no RAPL" in meter.stop().reason


def test_rapl_without_permission_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def deny(self: Path, *_: object, **__: object) -> str:
        raise PermissionError(str(self))

    meter = RaplMeter(tmp_path)
    monkeypatch.setattr(Path, "read_text", deny)
    meter.start()
    reading = meter.stop()
    assert reading.value_j is None
    assert "root" in reading.reason


def test_one_standing_counter_of_several_makes_the_sum_unknown() -> None:
    reading = difference(Counter((1.0, 2.0), 0.0), Counter((5.0, 2.0), 5.0), "gpu")
    assert reading.value_j is None


def test_null_meter_gives_its_reason() -> None:
    clock = Clock()
    meter = NullMeter("nothing here", clock)
    meter.start()
    clock.now += 3
    reading = meter.stop()
    assert (reading.value_j, reading.reason, reading.window_s) == (None, "nothing here", 3)


def test_replay_meter_returns_recorded_readings_then_ends(tmp_path: Path) -> None:
    path = tmp_path / "readings.json"
    row = {"value_j": 5.0, "label": "measured", "source": "replay", "scope": "gpu", "window_s": 1.0}
    path.write_text(json.dumps([row]))
    meter = ReplayMeter.from_file(path)
    meter.start()
    assert meter.stop() == Reading(5.0, "measured", "replay", "gpu", 1.0)
    assert meter.stop().value_j is None


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "readings.json"
    path.write_text('[{"joules": 1}]')
    with pytest.raises(InputError, match=r"readings\.json"):
        ReplayMeter.from_file(path)
