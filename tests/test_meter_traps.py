"""Every trap of real energy counters that is known, one test each, on a pretended NVML and a pretended RAPL tree.

The names are those of the list in the project's energy notes: what fooled others must not fool this meter.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from autopar.meters import NodeMeter, NodeReading, NvmlMeter, RaplMeter, Reading, ZeusMeter, add_up, node_reading
from autopar.meters.rapl import MOST_PACKAGE_W
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


# Processors


def zone(root: Path, name: str, kind: str, micro_joules: int, most: int = 1_000_000_000) -> Path:
    path = root / name
    path.mkdir(parents=True)
    (path / "name").write_text(kind + "\n")
    (path / "energy_uj").write_text(f"{micro_joules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


class Clock:
    """Seconds that tests set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rapl_sums_packages_and_their_memory_but_not_parts_of_packages(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 10_000_000)
    dram = zone(tmp_path, "intel-rapl:0/intel-rapl:0:1", "dram", 5_000_000)
    core = zone(tmp_path, "intel-rapl:0/intel-rapl:0:0", "core", 1)
    clock = Clock()
    meter = RaplMeter(tmp_path, clock)
    meter.start()
    clock.now += 0.5
    (package / "energy_uj").write_text("60000000")
    (dram / "energy_uj").write_text("8000000")
    (core / "energy_uj").write_text("50000000")
    reading = meter.stop()
    assert reading.value_j == pytest.approx(50 + 3)
    assert (reading.scope, reading.source) == ("package", "counter")
    assert "memory" not in reading.reason


def test_trap_platform_zone_contains_the_packages_and_is_left_out(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    platform = zone(tmp_path, "intel-rapl:1", "psys", 0)
    clock = Clock()
    meter = RaplMeter(tmp_path, clock)
    meter.start()
    clock.now += 0.5
    (package / "energy_uj").write_text("50000000")
    (platform / "energy_uj").write_text("90000000")
    reading = meter.stop()
    assert reading.value_j == pytest.approx(50)
    assert "memory has no counter" in reading.reason


def test_trap_rapl_wraps_several_times_in_a_window(tmp_path: Path) -> None:
    """The thread counts wraps; the window's ends alone would show nothing."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000_000)
    clock = Clock()
    meter = RaplMeter(tmp_path, clock, period_s=0.001)
    meter.start()
    for joules in (400, 900, 400, 900):
        (package / "partial").write_text(f"{joules}000000")
        (package / "partial").replace(package / "energy_uj")
        clock.now += 0.3
        until = time.monotonic() + 20
        while meter._last != [joules] and time.monotonic() < until:
            time.sleep(0.001)
    assert meter.stop().value_j == pytest.approx(4 * 500)


def test_trap_counter_that_may_have_wrapped_unseen_is_unknown(tmp_path: Path) -> None:
    """A stopped process polls nothing."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    clock = Clock()
    meter = RaplMeter(tmp_path, clock)
    meter.start()
    clock.now += 1.01 * 1000 / MOST_PACKAGE_W
    (package / "energy_uj").write_text("500")
    reading = meter.stop()
    assert reading.value_j is None
    assert "may have wrapped" in reading.reason


def test_trap_rapl_absent_in_a_container_or_virtual_machine_is_unknown(tmp_path: Path) -> None:
    meter = RaplMeter(tmp_path)
    meter.start()
    assert "no RAPL" in meter.stop().reason


def test_trap_rapl_without_permission_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = RaplMeter(tmp_path)

    def deny(self: Path, *_: object, **__: object) -> str:
        raise PermissionError(str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", deny)
        meter.start()
    reading = meter.stop()
    assert reading.value_j is None
    assert "root" in reading.reason


def test_trap_rapl_that_stands_still_is_unknown(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    clock = Clock()
    meter = RaplMeter(tmp_path, clock)
    meter.start()
    clock.now += 0.5
    assert "did not move" in meter.stop().reason


# One meter per node, summed over nodes


def one(joules: float | None, *devices: str, source: str = "counter") -> Reading:
    label = "unknown" if joules is None else "measured"
    return Reading(joules, label, source, "gpu", 2.0, joules, joules, "" if joules else "no counter", devices)


def node(gpu: Reading | None, host: Reading) -> NodeReading:
    return NodeReading(gpu, host)


def test_nodes_add_up_and_keep_their_devices() -> None:
    found = add_up([node(one(5.0, "a"), one(1.0, "x")), node(one(7.0, "b", source="integrated"), one(2.0, "y"))])
    assert found is not None
    assert found.gpu is not None
    assert (found.gpu.value_j, found.gpu.devices, found.gpu.source) == (12.0, ("a", "b"), "counter, integrated")
    assert found.host.value_j == 3.0


def test_trap_two_groups_of_ranks_on_one_machine_count_its_packages_once() -> None:
    """Eight processes, eight files, and double counting."""
    found = add_up([node(one(5.0, "a"), one(1.0, "x")), node(one(7.0, "b"), one(1.1, "x"))])
    assert found is not None
    assert found.gpu is not None
    assert (found.gpu.value_j, found.host.value_j) == (12.0, 1.0)


def test_trap_overlapping_groups_of_devices_are_unknown() -> None:
    found = add_up([node(one(5.0, "a", "b"), one(1.0, "x")), node(one(7.0, "b", "c"), one(1.0, "y"))])
    assert found is not None
    assert found.gpu is not None
    assert found.gpu.value_j is None


def test_trap_one_node_without_a_counter_makes_no_smaller_sum() -> None:
    found = add_up([node(one(5.0, "a"), one(1.0, "x")), node(one(None, "b"), one(1.0, "y"))])
    assert found is not None
    assert found.gpu is not None
    assert (found.gpu.value_j, found.gpu.reason) == (None, "no counter")


def test_readings_survive_the_way_between_processes() -> None:
    found = node(one(5.0, "a", "b"), one(None))
    assert node_reading(found.as_json()) == found
    assert node_reading(node(None, one(1.0)).as_json()).gpu is None


def test_a_node_measures_gpus_and_processors_apart(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with NodeMeter([0], FakeNvml(FakeBoard()), tmp_path) as meter:
        meter.start()
        time.sleep(0.25)
        (tmp_path / "intel-rapl:0/energy_uj").write_text("7000000")
        found = meter.stop()
    assert found.gpu is not None
    assert found.gpu.source == "counter"
    assert found.host.value_j == pytest.approx(7.0)


# Zeus


class Monitor:
    """What `zeus.monitor.ZeusMonitor` does here: energies by index, or an error."""

    def __init__(self, energy: dict[int, float]) -> None:
        self.energy = energy

    def __call__(self, gpu_indices: list[int] | None) -> Monitor:
        return self

    def begin_window(self, name: str) -> None:
        self.name = name

    def end_window(self, name: str) -> SimpleNamespace:
        assert name == self.name
        return SimpleNamespace(gpu_energy=self.energy, total_energy=sum(self.energy.values()))


def test_zeus_agrees_with_our_meter_on_the_same_energies() -> None:
    meter = ZeusMeter([0, 1], Monitor({0: 30.0, 1: 40.0}))
    meter.start()
    found = meter.stop()
    assert (found.value_j, found.source, found.label) == (70.0, "zeus", "measured")


@pytest.mark.parametrize(("energy", "words"), [({}, "finds no GPU"), ({0: 10.0, 1: 0.0}, "no energy")])
def test_trap_zeus_reports_nothing_as_zero(energy: dict[int, float], words: str) -> None:
    meter = ZeusMeter(monitor=Monitor(energy))
    meter.start()
    found = meter.stop()
    assert found.value_j is None
    assert words in found.reason


def test_zeus_that_is_not_installed_is_unknown_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zeus", None)
    meter = ZeusMeter()
    meter.start()
    assert "pip install zeus" in meter.stop().reason


def test_zeus_that_raises_is_unknown() -> None:
    def refuse(gpu_indices: list[int] | None) -> None:
        raise RuntimeError("no such GPU")

    assert "no such GPU" in ZeusMeter(monitor=refuse).stop().reason
