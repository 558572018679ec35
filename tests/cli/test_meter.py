"""`autopar meter` on pretended boards and on a machine without any counter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from autopar.cli.app import invoke
from autopar.meters import NodeMeter, ZeusMeter
from autopar.planner.meter import check_meters
from tests.machine import Machine, make_machine
from tests.nvml_double import FakeBoard, FakeNvml


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two boards, no Zeus."""
    monkeypatch.setitem(sys.modules, "zeus", None)
    yield from make_machine(tmp_path, monkeypatch, FakeBoard(), FakeBoard(watts=100.0))


def test_readings_are_told_with_source_scope_bounds_devices_and_what_is_missing(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["meter", "--seconds", "0.5", "--zeus"]) == 0
    text = capsys.readouterr().out
    assert "measured, source counter, scope gpu" in text
    assert text.count("NVIDIA A100-SXM4-80GB GPU-") == 2
    assert "window below 1 s" in text
    assert "integrated power against the counter" in text
    assert "Zeus: unknown: Zeus is not installed: pip install zeus" in text
    assert "processors: " in text


def test_json_holds_the_same(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["meter", "--seconds", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpus"]["label"] == "measured"
    assert found["gpus"]["low_j"] < found["gpus"]["value_j"] < found["gpus"]["high_j"]
    assert found["zeus"] is None


def test_a_machine_without_counters_says_unknown_and_no_figure(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.set()
    assert invoke(["meter", "--seconds", "0.05"]) == 0
    assert "GPUs: unknown: NVML finds no GPU" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e9"])
def test_a_window_that_cannot_be_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["meter", "--seconds", seconds]) == 2
    assert "--seconds" in capsys.readouterr().err


def test_zeus_is_compared_over_the_same_window(tmp_path: Path) -> None:
    """A monitor that reads the same boards agrees within the counter's step."""
    nvml = FakeNvml(FakeBoard(), FakeBoard(watts=200.0))
    boards = range(2)

    class Monitor:
        def __init__(self, gpu_indices: list[int] | None) -> None:
            self.first: list[int] = []

        def begin_window(self, _: str, *, sync_execution: bool) -> None:
            self.first = [nvml.nvmlDeviceGetTotalEnergyConsumption(i) for i in boards]

        def end_window(self, _: str, *, sync_execution: bool) -> SimpleNamespace:
            joules = {i: (nvml.nvmlDeviceGetTotalEnergyConsumption(i) - self.first[i]) / 1e3 for i in boards}
            return SimpleNamespace(gpu_energy=joules)

    found = check_meters(1.1, with_zeus=True, meter=NodeMeter([0, 1], nvml, tmp_path), zeus=ZeusMeter(monitor=Monitor))
    assert found.zeus_disagreement == pytest.approx(0.0, abs=0.2)
    assert found.host.value_j is None
