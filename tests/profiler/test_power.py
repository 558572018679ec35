"""Power by clock: the fits, and the whole measurement on a pretended GPU whose clocks are locked for real."""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.device import DeviceSpec, read_device
from autopar.cost.power import clock_power_factor, memory_w, rated_dynamic_w
from autopar.errors import InputError, ProfileError
from autopar.meters import NvmlMeter, Reading, Repeated, WindowRules
from autopar.nvml import Board, open_nvml
from autopar.planner.power import PowerRequest, board_of, device_name, measure_gpu
from autopar.profiler.power import PowerProfile, clocks_to_measure
from autopar.profiler.power_fit import ClockSample, PowerFit, below_limit, fit_power, fit_time
from autopar.resources import data_directory
from tests.machine import make_machine
from tests.nvml_double import NO_PERMISSION, FakeBoard

ROOT = Path(__file__).parents[2]
PROFILES = ROOT.parent / "shared" / "data" / "energy" / "stage_profiles.csv"
STILL = WindowRules(window_s=0.3, trials=1, warm_up_s=0.0, cool_down_s=0.0)
SPEED = 25.0
"""Of pretended seconds against real ones."""
CLOCKS_HZ = tuple(1e6 * mhz for mhz in range(1410, 209, -15))


def test_five_clocks_are_the_highest_two_above_the_ridge_and_two_below() -> None:
    found = clocks_to_measure(CLOCKS_HZ)
    assert len(found) == 5
    assert found[0] == 1410e6
    assert sum(clock > 0.77 * 1410e6 for clock in found) == 3
    assert set(found) <= set(CLOCKS_HZ)
    assert clocks_to_measure(()) == ()
    assert clocks_to_measure((900e6,)) == (900e6,)


curves = st.builds(
    PowerFit,
    base_w=st.floats(20, 120),
    w_per_hz=st.floats(100e-9, 300e-9),
    ridge_hz=st.floats(0.65, 0.85).map(lambda share: share * 1410e6),
    rise_per_hz=st.floats(0.3e-9, 1.2e-9),
    error=st.just(0.0),
)


@given(curve=curves, fixed_s=st.floats(0, 0.05), cycles=st.floats(1e7, 1e9), hint=st.floats(-0.03, 0.03))
@settings(deadline=None, max_examples=40)
def test_fits_of_five_clocks_follow_a_curve_of_their_form_at_all_others(
    curve: PowerFit, fixed_s: float, cycles: float, hint: float
) -> None:
    """`hint`: by how much the device file errs about the ridge."""
    clocks = clocks_to_measure(CLOCKS_HZ, curve.ridge_hz / 1410e6 + hint)
    samples = [ClockSample(f, fixed_s + cycles / f, curve.power_w(f)) for f in clocks]
    found, times = fit_power(samples, 1410e6), fit_time(samples)
    for clock in (f for f in CLOCKS_HZ if f >= clocks[-1]):
        assert found.power_w(clock) == pytest.approx(curve.power_w(clock), rel=0.01)
        assert times.time_s(clock) == pytest.approx(fixed_s + cycles / clock, rel=1e-6)


def test_the_clock_within_a_limit_is_where_the_curve_meets_it() -> None:
    curve = PowerFit(50.0, 200e-9, 1.09e9, 0.7e-9, 0.0)
    clock = curve.clock_within(400.0, 1.41e9)
    assert curve.power_w(clock) == pytest.approx(400.0)
    assert curve.clock_within(600.0, 1.41e9) == 1.41e9
    assert curve.clock_within(40.0, 1.41e9) == pytest.approx(0.0, abs=1.0)


def test_samples_at_the_limit_do_not_shape_the_fit() -> None:
    samples = [ClockSample(1e9, 1.0, 300.0), ClockSample(1.2e9, 1.0, 396.0), ClockSample(1.4e9, 1.0, 400.0)]
    assert below_limit(samples, 400.0) == samples[:1]


def test_too_few_clocks_and_power_that_falls_are_refused() -> None:
    with pytest.raises(ProfileError, match="at least two clocks"):
        fit_time([ClockSample(1e9, 1.0, 300.0)] * 3)
    with pytest.raises(ProfileError, match="needs 4 clocks"):
        fit_power([ClockSample(f, 1.0, 300.0) for f in (1e9, 1.1e9, 1.2e9)], 1.4e9)
    with pytest.raises(ProfileError, match="does not grow"):
        fit_power([ClockSample(f, 1.0, 1e11 / f) for f in (1e9, 1.1e9, 1.2e9, 1.3e9)], 1.4e9)


def published() -> dict[tuple[str, str], dict[float, ClockSample]]:
    """(stage, instruction) -> samples at 38 clocks."""
    found: dict[tuple[str, str], dict[float, ClockSample]] = defaultdict(dict)
    with PROFILES.open() as file:
        for row in csv.DictReader(file):
            if row["energy_j"] and row["frequency_mhz"] and row["stage"] in ("0", "7"):
                mhz, time_s = float(row["frequency_mhz"]), float(row["time_s"])
                sample = ClockSample(1e6 * mhz, time_s, float(row["energy_j"]) / time_s)
                found[row["stage"], row["instruction"]][1e6 * mhz] = sample
    return found


@pytest.mark.skipif(not PROFILES.exists(), reason="needs the published measurements beside the repository")
def test_five_of_38_measured_clocks_reproduce_the_other_33() -> None:
    """Stages of Bloom-176B on A100 SXM: mean errors near those of fits through all 38 clocks (0.5 to 1.0 %)."""
    profiles = published()
    assert len(profiles) == 4
    for samples in profiles.values():
        five = [samples[clock] for clock in clocks_to_measure(tuple(samples))]
        rest = [sample for sample in samples.values() if sample not in five]
        power, times = fit_power(five, 1410e6), fit_time(five)
        assert len(rest) == 33
        power_errors = [abs(power.power_w(s.clock_hz) / s.power_w - 1) for s in rest]
        time_errors = [abs(times.time_s(s.clock_hz) / s.time_s - 1) for s in rest]
        assert sum(power_errors) / 33 < 0.02
        assert sum(time_errors) / 33 < 0.015


# The whole measurement


class PretendedGpu:
    """Work whose power at the board's present clock is that of a device file; time is pretended.

    Idle and blocked power are what the board draws before and after its context is made.
    """

    def __init__(self, spec: DeviceSpec, board: Board, file: Path) -> None:
        self.spec, self.board, self.file = spec, board, file
        self.visited: list[float] = []

    def make(self, *_: object) -> tuple[Callable[[], Repeated], Callable[[], Repeated]]:
        self.draw(self.spec.blocked_w)
        return self.product, self.stream

    def draw(self, watts: float) -> None:
        """What NVML reads from now on."""
        boards = json.loads(self.file.read_text())
        boards[0]["watts"] = watts
        self.file.write_text(json.dumps(boards))

    def at_clock(self) -> tuple[DeviceSpec, float]:
        share = 1e6 * self.board.clock_mhz() / self.spec.clock_max_hz
        return replace(self.spec, clock_share=share), share

    def product(self) -> Repeated:
        spec, share = self.at_clock()
        self.visited.append(share)
        natural_w = spec.gemm_share * rated_dynamic_w(spec) * clock_power_factor(spec, share / spec.sustained_share)
        return self.work(min(spec.limit_w, spec.blocked_w + natural_w), 0.01 + 0.09 / share)

    def stream(self) -> Repeated:
        spec, _ = self.at_clock()
        return self.work(spec.blocked_w + memory_w(spec), 0.05)

    def work(self, watts: float, time_s: float) -> Repeated:
        reading = Reading(watts * time_s, "measured", "counter", "gpu", 5.0)
        return Repeated(reading, time_s, 50, 0.0)


@pytest.fixture
def boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One A100 whose seconds are fast."""
    monkeypatch.setenv("FAKE_NVML_SPEED", str(SPEED))
    for machine in make_machine(tmp_path, monkeypatch, FakeBoard(watts=55.0)):
        yield machine.file


def a100() -> DeviceSpec:
    return read_device(data_directory("costmodels") / "a100-sxm-80gb.json")


def measured(file: Path, *, lock_clocks: bool, spec: DeviceSpec) -> tuple[PowerProfile, float, PretendedGpu]:
    with open_nvml() as nvml:
        board = board_of(nvml, "cuda:0", {})
        gpu = PretendedGpu(spec, board, file)
        with NvmlMeter([board.uuid], clock=lambda: SPEED * time.perf_counter()) as meter:
            request = PowerRequest("a100-sxm-80gb", STILL, lock_clocks)
            found, blocked_w = measure_gpu(board, meter, gpu.make, request, lambda _: None)
    return found, blocked_w, gpu


def test_a_gpu_whose_clocks_may_be_set_is_measured_at_five_and_its_curve_found_again(boards: Path) -> None:
    """The oracle is a device file: read back with the measured numbers, it prices every clock as before."""
    truth = replace(a100(), gemm_share=0.9, sustained_share=1.0)
    found, blocked_w, gpu = measured(boards, lock_clocks=True, spec=truth)
    assert len(gpu.visited) == 5
    assert blocked_w == pytest.approx(truth.blocked_w, rel=0.02)
    again = read_device(data_directory("costmodels") / "a100-sxm-80gb.json", found.numbers)
    assert again.idle_w == pytest.approx(55.0, rel=0.02)
    assert again.gemm_share == pytest.approx(truth.gemm_share, rel=0.02)
    assert again.memory_share == pytest.approx(truth.memory_share, rel=0.02)
    assert again.sustained_share == pytest.approx(1.0)
    for share in (0.6, 0.7, 0.8, 0.9, 1.0):
        assert clock_power_factor(again, share) == pytest.approx(clock_power_factor(truth, share), rel=0.04)
        for spec in (again, truth):
            assert memory_w(replace(spec, clock_share=share)) == pytest.approx(
                memory_w(replace(truth, clock_share=share)), rel=0.04
            )
    assert {number.tag for number in again.numbers if number.path == "clock.ridge_share"} == {"measured"}
    assert found.power is not None
    board = FakeBoard(**json.loads(boards.read_text())[0])
    assert board.locked_mhz is None
    assert board.log.count("unlock") == 5


def test_where_the_limit_holds_the_sustained_clock_is_below_the_highest(boards: Path) -> None:
    truth = replace(a100(), gemm_share=1.0, sustained_share=0.9)
    found, _, _ = measured(boards, lock_clocks=True, spec=truth)
    numbers = {number.path: number.value for number in found.numbers}
    assert numbers["clock.sustained_share"] == pytest.approx(0.9, abs=0.02)
    assert numbers["power.gemm_share"] == pytest.approx(1.0, abs=0.01)
    assert any("power limit held" in note for note in found.notes)


def test_without_asking_the_clock_is_left_alone_and_the_figures_say_so(boards: Path) -> None:
    found, _, gpu = measured(boards, lock_clocks=False, spec=a100())
    assert gpu.visited == [1.0]
    assert FakeBoard(**json.loads(boards.read_text())[0]).log == []
    assert found.power is None
    assert "clock.ridge_share" not in {number.path for number in found.numbers}
    assert all("1410 MHz) only" in n.source for n in found.numbers if n.path == "power.gemm_share")
    assert any("--lock-clocks" in note for note in found.notes)


def test_without_permission_the_present_clock_is_measured_and_the_commands_are_told(boards: Path) -> None:
    boards.write_text(json.dumps([vars(FakeBoard(watts=55.0, refused={"SetGpuLockedClocks": NO_PERMISSION}))]))
    found, _, gpu = measured(boards, lock_clocks=True, spec=a100())
    assert gpu.visited == [1.0]
    assert found.power is None
    assert any("sudo nvidia-smi -i 0 -lgc" in note for note in found.notes)


def test_power_that_no_meter_knows_leaves_the_device_file_alone(boards: Path) -> None:
    refused = {"GetTotalEnergyConsumption": 3, "GetPowerUsage": 3}
    boards.write_text(json.dumps([vars(FakeBoard(refused=refused, scopes=[]))]))
    found, blocked_w, _ = measured(boards, lock_clocks=True, spec=a100())
    assert found.numbers == ()
    assert blocked_w == a100().blocked_w
    assert any("no energy counter" in note for note in found.notes)


def test_devices_are_counted_as_cuda_counts_them(boards: Path) -> None:
    boards.write_text(
        json.dumps(
            [vars(FakeBoard()), vars(FakeBoard(index=1, name="NVIDIA L4")), vars(FakeBoard(index=2, name="NVIDIA X"))]
        )
    )
    assert device_name("cuda:1", {}) == "l4"
    assert device_name("cuda:0", {"CUDA_VISIBLE_DEVICES": "1,0"}) == "l4"
    with pytest.raises(InputError, match="no cost model"):
        device_name("cuda", {"CUDA_VISIBLE_DEVICES": "2"})
    with pytest.raises(InputError, match="no device 'cuda:1' here; this machine has cpu, cuda:0"):
        device_name("cuda:1", {"CUDA_VISIBLE_DEVICES": "1"})
    for strange in ("tpu", "cuda:x", "cuda:-1"):
        with pytest.raises(InputError, match="no device"):
            device_name(strange, {})
