"""Every trap of real energy counters that is known, one test each, on a pretended NVML and a pretended RAPL tree.

The names are those of the list in the project's energy notes: what fooled others must not fool this meter.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from autopar.meters import NvmlMeter, Reading
from autopar.meters.visible import visible_gpus
from autopar.nvml import open_nvml
from tests.nvml_double import NO_DRIVER, NO_PERMISSION, NOT_SUPPORTED, FakeBoard, FakeNvml

SPEED = 25.0
"""Of pretended seconds against real ones."""


def fast() -> float:
    """A clock on which a sampler's real 2 ms are 50 ms."""
    return time.perf_counter() * SPEED


def measure(nvml: FakeNvml, seconds: float = 4.0, during: Callable[[], None] | None = None) -> Reading:
    """A window of so many pretended seconds."""
    nvml.clock = fast
    with NvmlMeter(nvml=nvml, clock=fast, period_s=0.05 / SPEED) as meter:
        meter.start()
        until = fast() + seconds
        if during is not None:
            during()
        while fast() < until:
            time.sleep(0.001)
        return meter.stop()


def within(reading: Reading) -> tuple[float, float]:
    assert reading.low_j is not None
    assert reading.high_j is not None
    return reading.low_j, reading.high_j


# Counters of GPUs


def test_trap_counter_steps_every_100_ms_so_bounds_hold_the_truth_at_any_phase() -> None:
    """A begin and an end reading are each up to 0.1 s old."""
    clock = SimpleNamespace(now=0.0)
    for phase, length in itertools.product((0.0, 0.03, 0.099), (1.0, 1.05, 5.04)):
        nvml = FakeNvml(FakeBoard(), FakeBoard(watts=200.0), clock=lambda: clock.now)
        clock.now = 100 + phase
        with NvmlMeter(nvml=nvml, clock=nvml.clock) as meter:
            meter.start()
            clock.now += length
            reading = meter.stop()
        low, high = within(reading)
        assert (reading.label, reading.source, reading.scope) == ("measured", "counter", "gpu")
        assert low - 1e-6 <= 500 * length <= high + 1e-6


def test_trap_window_below_the_counter_step_is_unknown() -> None:
    nvml = FakeNvml(FakeBoard(refused={"GetPowerUsage": NOT_SUPPORTED}, scopes=[]))
    with NvmlMeter(nvml=nvml) as meter:
        meter.start()
        reading = meter.stop()
    assert reading.value_j is None
    assert "shorter than the counter's step" in reading.reason


@pytest.mark.parametrize(("seconds", "words"), [(0.6, "below 1 s"), (1.6, "below 2 s"), (3.0, "")])
def test_trap_short_windows_are_marked(seconds: float, words: str) -> None:
    reading = measure(FakeNvml(FakeBoard()), seconds)
    assert words in reading.reason
    assert bool(words) == bool(reading.reason)


def test_trap_counter_not_supported_falls_back_to_integrated_power_and_says_so() -> None:
    """Before Volta, and many virtual GPUs."""
    reading = measure(FakeNvml(FakeBoard(refused={"GetTotalEnergyConsumption": NOT_SUPPORTED})))
    assert (reading.label, reading.source) == ("measured", "integrated")
    assert reading.value_j == pytest.approx(300 * reading.window_s, rel=0.05)
    assert "no energy counter: Not Supported" in reading.reason


def test_trap_neither_counter_nor_power_is_unknown_with_both_reasons() -> None:
    refused = {"GetTotalEnergyConsumption": NOT_SUPPORTED, "GetPowerUsage": NOT_SUPPORTED}
    reading = measure(FakeNvml(FakeBoard(refused=refused, scopes=[])), 0.5)
    assert (reading.value_j, reading.label) == (None, "unknown")
    assert "Not Supported" in reading.reason
    assert "power cannot be read" in reading.reason


@pytest.mark.parametrize(("code", "words"), [(NO_PERMISSION, "Insufficient Permissions"), (NO_DRIVER, "Driver Not")])
def test_trap_nvml_that_cannot_be_opened_is_unknown_with_the_reason(code: int, words: str) -> None:
    nvml = FakeNvml(FakeBoard())
    nvml.init_error = code
    reading = measure(nvml, 0.2)
    assert reading.value_j is None
    assert words in reading.reason


def test_trap_counter_that_needs_permission_is_integrated_and_says_why() -> None:
    reading = measure(FakeNvml(FakeBoard(refused={"GetTotalEnergyConsumption": NO_PERMISSION})))
    assert reading.source == "integrated"
    assert "Insufficient Permissions" in reading.reason


def test_trap_frozen_counter_is_never_zero() -> None:
    reading = measure(FakeNvml(FakeBoard(frozen=True)))
    assert reading.source == "integrated"
    assert "did not move" in reading.reason


def test_trap_frozen_counter_with_a_frozen_sensor_is_unknown() -> None:
    """Telemetry that stands still inside a process shows the same power to the last digit."""
    reading = measure(FakeNvml(FakeBoard(frozen=True, sensor_frozen=True)))
    assert (reading.value_j, reading.label) == (None, "unknown")
    assert "nor did the power reading" in reading.reason


def test_trap_counter_that_runs_backwards_is_not_believed() -> None:
    """The driver was loaded anew."""
    board = FakeBoard()
    reading = measure(FakeNvml(board), during=lambda: setattr(board, "offset_j", -1e12))
    assert reading.source == "integrated"
    assert "backwards" in reading.reason


def test_trap_absurd_counter_is_not_believed() -> None:
    """A counter that says more than the boards can draw."""
    reading = measure(FakeNvml(FakeBoard(factor=10.0)))
    assert reading.source == "integrated"
    assert reading.value_j == pytest.approx(300 * reading.window_s, rel=0.05)
    assert "limited to 400 W" in reading.reason


def test_trap_board_above_its_rated_power_is_believed() -> None:
    """475 to 482 W were measured on boards rated 400 W."""
    assert measure(FakeNvml(FakeBoard(watts=480.0))).source == "counter"


def test_cross_check_of_counter_and_integrated_power_is_in_every_reading() -> None:
    reading = measure(FakeNvml(FakeBoard(), FakeBoard(watts=100.0)))
    assert reading.disagreement == pytest.approx(0.0, abs=0.06)
    assert reading.reason == ""


def test_trap_counter_and_integrated_power_that_disagree_widen_the_bounds() -> None:
    """187 against 327 J over five idle seconds."""
    reading = measure(FakeNvml(FakeBoard(watts=200.0, factor=0.57)))
    low, high = within(reading)
    assert reading.source == "counter"
    assert reading.disagreement == pytest.approx(1 / 0.57 - 1, abs=0.15)
    assert "integrated power says" in reading.reason
    assert low <= 0.57 * 200 * reading.window_s
    assert high >= 0.95 * 200 * reading.window_s


@pytest.mark.parametrize(
    ("board", "is_average", "scope"),
    [
        (FakeBoard(scopes=[0]), False, "gpu"),
        (FakeBoard(scopes=[], capability=(7, 0)), False, "gpu"),
        (FakeBoard(scopes=[], capability=(8, 0)), False, "gpu"),
        (FakeBoard(scopes=[], capability=(8, 6)), True, "gpu"),
        (FakeBoard(scopes=[], capability=(9, 0)), True, "gpu"),
        (FakeBoard(scopes=[], refused={"GetCudaComputeCapability": NOT_SUPPORTED}), None, "gpu"),
        (FakeBoard(scopes=[1], capability=(9, 0)), False, "module"),
    ],
)
def test_trap_the_same_power_call_means_different_things_on_different_boards(
    board: FakeBoard, is_average: bool | None, scope: str
) -> None:
    power = open_nvml(FakeNvml(board)).board(0).power()
    assert (power.is_average, power.scope) == (is_average, scope)


def test_trap_averaged_power_is_told_and_less_certain() -> None:
    refused = {"GetTotalEnergyConsumption": NOT_SUPPORTED}
    sharp = measure(FakeNvml(FakeBoard(refused=dict(refused))))
    dull = measure(FakeNvml(FakeBoard(refused=dict(refused), scopes=[], capability=(9, 0))))
    assert "1 s average" in dull.reason
    assert "1 s average" not in sharp.reason
    assert sharp.low_j is not None
    assert dull.low_j is not None
    assert dull.low_j < sharp.low_j


def test_trap_module_power_is_labelled_since_it_holds_the_processor() -> None:
    refused = {"GetTotalEnergyConsumption": NOT_SUPPORTED}
    assert measure(FakeNvml(FakeBoard(scopes=[1], refused=refused))).scope == "module"


def test_trap_divided_board_is_flagged_as_shared() -> None:
    reading = measure(FakeNvml(FakeBoard(is_divided=True)))
    assert "MIG" in reading.reason
    assert "shared" in reading.reason


def test_trap_virtual_gpu_is_flagged() -> None:
    assert "virtual" in measure(FakeNvml(FakeBoard(is_virtual=True))).reason


def test_trap_one_dead_gpu_of_several_makes_no_smaller_sum() -> None:
    nvml = FakeNvml(FakeBoard(), FakeBoard(frozen=True, sensor_frozen=True), FakeBoard())
    reading = measure(nvml)
    assert reading.source == "integrated"
    assert nvml.boards[1].uuid in reading.reason
    assert reading.value_j == pytest.approx(900 * reading.window_s, rel=0.05)


def test_every_reading_names_its_devices() -> None:
    nvml = FakeNvml(FakeBoard(), FakeBoard())
    assert [uuid in text for uuid, text in zip((b.uuid for b in nvml.boards), measure(nvml).devices, strict=True)]


def test_trap_machine_without_gpus_is_unknown() -> None:
    assert "no GPU" in measure(FakeNvml(), 0.1).reason


def test_trap_a_meter_that_is_not_open_or_not_started_knows_nothing() -> None:
    meter = NvmlMeter(nvml=FakeNvml(FakeBoard()))
    meter.start()
    assert "not open" in meter.stop().reason
    with NvmlMeter(nvml=FakeNvml(FakeBoard(refused={"GetPowerUsage": 3}, scopes=[]))) as opened:
        assert "not started" in opened.stop().reason


def test_trap_a_window_left_open_does_not_leak_into_the_next() -> None:
    """Windows in notebooks: a second start begins anew."""
    nvml = FakeNvml(FakeBoard(), clock=fast)
    with NvmlMeter(nvml=nvml, clock=fast, period_s=0.002) as meter:
        meter.start()
        time.sleep(0.08)
        meter.start()
        time.sleep(0.04)
        reading = meter.stop()
    assert reading.window_s < 0.08 * SPEED


def test_nvml_is_closed_again_whatever_happens() -> None:
    nvml = FakeNvml(FakeBoard())
    measure(nvml, 0.2)
    assert nvml.opened == 0


# Which GPU is measured


@pytest.mark.parametrize(
    ("listed", "count", "expected"),
    [
        (None, 2, [0, 1]),
        ("3,1", 2, [3, 1]),
        ("3,1", 1, [3]),
        ("GPU-00000001-aaaa", 1, ["GPU-00000001-aaaa"]),
        ("MIG-x/1/0,0", 2, ["MIG-x/1/0", 0]),
        ("1,-1,0", 2, [1]),
        ("", 1, []),
    ],
)
def test_trap_cuda_counts_other_gpus_than_nvml(listed: str | None, count: int, expected: list[int | str]) -> None:
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_gpus(environment, count) == expected


def test_trap_mig_identifier_is_measured_on_its_board_once() -> None:
    nvml = FakeNvml(FakeBoard(), FakeBoard(watts=100.0, is_divided=True), clock=fast)
    with NvmlMeter(["MIG-a1", "MIG-b1"], nvml, fast, 0.002) as meter:
        assert meter.devices == (f"NVIDIA A100-SXM4-80GB {nvml.boards[1].uuid}",)
    with NvmlMeter(["GPU-00000001"], nvml) as meter:
        assert nvml.boards[1].uuid in meter.devices[0]
    with NvmlMeter(["GPU-9"], nvml) as meter:
        meter.start()
        assert "Not Found" in meter.stop().reason
