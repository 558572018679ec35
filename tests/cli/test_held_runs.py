"""`autopar run --lock-clocks` as a process on pretended boards: told, held while it runs, restored however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cli.app import invoke
from autopar.ir.plan import Plan
from autopar.ir.serialize import save_plan
from autopar.ir.solution import Pins
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from tests.cli.helpers import MODEL
from tests.machine import Machine, make_machine
from tests.nvml_double import NO_PERMISSION, FakeBoard

pytestmark = pytest.mark.dist
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Asks for a clock per stage, of a model in a file of its own."""
    path = tmp_path_factory.mktemp("model") / "model.py"
    path.write_text(MODEL)
    return clocked_plan(str(path))


@pytest.fixture
def machine(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two A100, and the plan in the working directory."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    save_plan(plan, "plan.json")
    yield from make_machine(tmp_path, monkeypatch, FakeBoard(), FakeBoard())


def clocked_plan(model: str) -> Plan:
    pins = Pins(dp=1, tp=1, pp=2, num_microbatches=2, schedule="1f1b")
    request = PlanRequest(2, gpu="a100-sxm-80gb", use_all=True, pins=pins, profile="none", gpu_power_limit_w=300.0)
    plan = plan_model(model, {}, request)
    pairs = zip(plan.decisions.stages, (1080e6, 900e6), strict=True)
    stages = tuple(replace(stage, clock_hz=hz) for stage, hz in pairs)
    return replace(plan, decisions=replace(plan.decisions, stages=stages))


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "autopar", "run", "plan.json", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_run_killed_outright_leaves_the_boards_as_they_were(machine: Machine) -> None:
    process = start("--steps", "1000000", "--lock-clocks", "--set-power-limit")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    assert machine.settings() == [(1080.0, 300.0, (1593, 1410)), (900.0, 300.0, (1593, 1410))]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert until(machine.is_clean)


def test_a_run_without_permission_goes_on_and_tells_the_commands_in_text_and_json(machine: Machine) -> None:
    machine.set(*(FakeBoard(refused={"SetGpuLockedClocks": NO_PERMISSION}) for _ in range(2)))
    process = start("--steps", "2", "--lock-clocks", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    content = json.loads(out)
    assert content["boards"]["clocks_mhz"] == {}
    assert content["boards"]["commands"][0] == "sudo nvidia-smi -i 0 -lgc 1080,1080"
    assert "Insufficient Permissions" in content["boards"]["notes"][0]
    assert content["energy_j"]["label"] == "assumed"
    assert content["energy_j"]["value"] > 0
    assert set(content["energy_parts"]) == {"CPUs"}
    assert any("not measured" in note for note in content["notes"])
    assert machine.is_clean()
    assert os.listdir(machine.states) == ["lock"]


def test_a_schedule_of_the_clocks_command_is_followed_instruction_by_instruction(machine: Machine, plan: Plan) -> None:
    stages = tuple(replace(stage, clock_hz=0.0) for stage in plan.decisions.stages)
    save_plan(replace(plan, decisions=replace(plan.decisions, stages=stages)), "plan.json")
    assert invoke(["clocks", "plan.json", "--deadline", "1s", "--out", "clocks.json"]) == 0
    content = json.loads(Path("clocks.json").read_text())
    for own in content["stages"]:  # clocks that nobody could take for those of another instruction
        own["clocks_mhz"] = [900.0 + 15 * (2 * own["stage"] + (own["kind"] == "B"))] * len(own["microbatches"])
    Path("clocks.json").write_text(json.dumps(content))
    process = start("--steps", "3", "--clock-schedule", "clocks.json", "--clock-switch-time", "1us", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    notes = json.loads(out)["notes"]
    assert any("rank 0 changed its clock" in note and "refused" not in note for note in notes)
    for rank, board in enumerate(machine.boards()):
        clocks = {915.0 + 30 * rank, 900.0 + 30 * rank}
        set_to = [float(line.split("-")[-1]) for line in board.log if line.startswith("lock")]
        assert set(set_to) == clocks
        assert set_to[0] == max(clocks)  # before the first step, the highest
    assert machine.is_clean()
