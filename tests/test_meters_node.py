"""Traps of processors' counters, of sums over nodes, and of Zeus as a second opinion; on a pretended RAPL tree."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from autopar.meters import NodeMeter, NodeReading, RaplMeter, Reading, ZeusMeter, add_up, node_reading
from autopar.meters.rapl import MOST_PACKAGE_W
from tests.nvml_double import FakeBoard, FakeNvml

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
    assert "whoever uses them" in reading.reason


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

    def begin_window(self, name: str, *, sync_execution: bool) -> None:
        self.name = name

    def end_window(self, name: str, *, sync_execution: bool) -> SimpleNamespace:
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
