"""Meters without a device, readings, windows of repeated work; the traps of real counters are in the files beside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from autopar.errors import InputError
from autopar.meters import (
    Counter,
    NullMeter,
    NvmlMeter,
    Reading,
    ReplayMeter,
    WindowRules,
    difference,
    measure_repeated,
)
from autopar.nvml import NvmlError, open_nvml
from tests import nvml_double


class Clock:
    """Seconds that tests set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def reading(value_j: float, window_s: float = 1.0) -> Reading:
    return Reading(value_j, "measured", "replay", "gpu", window_s)


def test_null_meter_gives_its_reason() -> None:
    clock = Clock()
    meter = NullMeter("nothing here", clock)
    meter.start()
    clock.now += 3
    found = meter.stop()
    assert (found.value_j, found.reason, found.window_s) == (None, "nothing here", 3)


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


def test_one_standing_counter_of_several_makes_the_sum_unknown_and_is_named() -> None:
    found = difference(Counter((1.0, 2.0), 0.0), Counter((5.0, 2.0), 5.0), "gpu", ("one", "two"))
    assert found.value_j is None
    assert "of two did not move" in found.reason


def test_nvml_is_not_imported_before_a_meter_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = NvmlMeter()
    with meter as opened:
        opened.start()
        assert "nvidia-ml-py" in opened.stop().reason


@pytest.mark.parametrize("module", ["autopar.meters", "autopar.clocks.hold", "autopar.planner.settings"])
def test_trap_importing_starts_no_process_thread_or_device_work(module: str) -> None:
    code = (
        f"import sys, threading, {module}; from pathlib import Path; "
        "children = Path('/proc/self/task').glob('*/children'); "
        "loaded = {'pynvml', 'torch', 'zeus'} & set(sys.modules); "
        "sys.exit(bool(loaded) or threading.active_count() > 1 or any(c.read_text() for c in children))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_binding_has_the_functions_constants_and_error_codes_that_double_and_adapter_use() -> None:
    import pynvml

    names = [name for name in dir(nvml_double.FakeNvml) if name.startswith("nvml")]
    names += [f"nvmlDevice{name}" for name in dir(nvml_double.BoardFunctions) if name[0].isupper()]
    assert len(names) > 20
    for name in names:
        create_autospec(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)
    assert pynvml.NVMLError(4).value == 4
    codes = ("NOT_SUPPORTED", "NO_PERMISSION", "NOT_FOUND", "DRIVER_NOT_LOADED", "FUNCTION_NOT_FOUND")
    assert [getattr(pynvml, f"NVML_ERROR_{code}") for code in codes] == [3, 4, 6, 9, 13]
    assert (pynvml.NVML_FI_DEV_POWER_AVERAGE, pynvml.NVML_FI_DEV_POWER_INSTANT) == (185, 186)
    assert (pynvml.NVML_POWER_SCOPE_GPU, pynvml.NVML_POWER_SCOPE_MODULE) == (0, 1)
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (1, 2)
    assert (pynvml.NVML_RESTRICTED_API_SET_APPLICATION_CLOCKS, pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU) == (0, 2)


def test_an_older_binding_without_a_function_counts_as_not_supporting_it() -> None:
    class Old:
        NVMLError = nvml_double.NVMLError

        def nvmlInit(self) -> None:  # noqa: N802
            """Opens."""

    with pytest.raises(NvmlError, match="nvmlDeviceGetCount") as caught:
        open_nvml(Old()).boards()
    assert caught.value.kind == "unsupported"


class Work:
    """Runs of 0.1 s each, and a meter that reads so many watts in each window in turn."""

    def __init__(self, watts: tuple[float | None, ...]) -> None:
        self.clock = Clock()
        self.rests: list[float] = []
        self._watts = iter(watts)
        self._began = 0.0

    def run(self) -> None:
        self.clock.advance(0.1)

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.clock.advance(seconds)

    def start(self) -> None:
        self._began = self.clock()

    def stop(self) -> Reading:
        window_s, watts = self.clock() - self._began, next(self._watts)
        if watts is None:
            return Reading(None, "unknown", "none", "gpu", window_s, reason="no counter")
        joules = watts * window_s
        return Reading(joules, "measured", "counter", "gpu", window_s, joules - watts * 0.1, joules + watts * 0.1)


def measured(work: Work, rules: WindowRules) -> Iterator[float | None]:
    found = measure_repeated(work.run, work, rules, clock=work.clock, sleep=work.rest)
    yield from (found.reading.value_j, found.time_s, found.spread, found.count)


def test_repeated_work_is_warmed_up_measured_in_whole_windows_and_rested() -> None:
    work = Work((300.0, 310.0, 290.0))
    joules, time_s, spread, count = measured(work, WindowRules(5.0, 3, 1.0, 5.0))
    assert joules == pytest.approx(30.0, rel=1e-9)
    assert time_s == pytest.approx(0.1)
    assert spread == pytest.approx(20 / 300)
    assert count == pytest.approx(3 * 50, abs=3)


def test_trials_begin_at_different_phases_of_the_sensor() -> None:
    work = Work((300.0,) * 4)
    list(measured(work, WindowRules(1.0, 4, 0.0, 5.0)))
    assert len({round(rest % 0.1, 6) for rest in work.rests}) == 3
    assert all(rest >= 5.0 for rest in work.rests)


def test_bounds_of_repeated_work_hold_every_trial() -> None:
    work = Work((300.0, 330.0, 270.0))
    found = measure_repeated(work.run, work, WindowRules(5.0, 3, 0.0, 0.0), clock=work.clock, sleep=work.rest)
    assert found.reading.low_j is not None
    assert found.reading.high_j is not None
    assert found.reading.low_j < 27.0
    assert found.reading.high_j > 33.0


def test_one_unknown_trial_makes_the_energy_unknown_but_not_the_time() -> None:
    joules, time_s, _, _ = measured(Work((300.0, None, 300.0)), WindowRules(1.0, 3, 0.0, 0.0))
    assert joules is None
    assert time_s == pytest.approx(0.1)
