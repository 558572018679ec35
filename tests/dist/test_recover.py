"""Runs survive their workers: killed while a checkpoint is written, killed twice on the way from 4 to 2, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autopar.errors import WorkerError
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.ir.serialize import save_plan
from autopar.planner.again import plan_again
from autopar.planner.execute import run_plan
from autopar.planner.plan import plan_model
from autopar.planner.recover import Policy, Survived, run_surviving
from autopar.planner.request import PlanRequest
from benchmarks.failures import Killer, disturbed_run, is_alive, losses_of, workers_of

pytestmark = pytest.mark.dist
MODEL = str(Path(__file__).parents[2] / "benchmarks" / "models" / "points.py")
OPTIONS = {"width": "64", "batch": "48", "samples": "200"}


def planned(num_gpus: int) -> Plan:
    request = PlanRequest(num_gpus=num_gpus, gpu="cpu", use_all=True, with_baselines=False)
    return plan_model(MODEL, OPTIONS, request)


def check(survived: Survived, killer: Killer, steps: int) -> None:
    """The run came to its end, nothing is left, and each restart took up what was saved when its cause struck."""
    found = losses_of(killer.directory)
    assert sorted(found) == list(range(1, steps + 1))
    assert len(survived.restarts) == len(killer.kills) == killer.num_kills
    assert [r.num_gpus[1] for r in survived.restarts][-1] == killer.sizes[-1]
    for kill, restart in zip(killer.kills, survived.restarts, strict=True):
        assert restart.step >= kill.saved
    assert killer.seen
    assert not any(map(is_alive, killer.seen))


def test_a_worker_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    settings = RunSettings(steps=12, checkpoints=str(tmp_path / "rough"), every=3)
    killer = Killer(tmp_path / "rough", 1, seed=0, sizes=(2, 1), moments=("writing",))
    survived = disturbed_run(planned(2), settings, killer)
    check(survived, killer, steps=12)
    assert "killed by SIGKILL" in survived.restarts[0].cause
    calm = RunSettings(steps=12, checkpoints=str(tmp_path / "calm"))
    run_plan(planned(1), calm)
    expected, found = losses_of(tmp_path / "calm"), losses_of(tmp_path / "rough")
    assert max(abs(found[s] - expected[s]) / expected[s] for s in expected) < 1e-5


@pytest.mark.slow
def test_kills_from_four_processes_to_two(tmp_path: Path) -> None:
    settings = RunSettings(steps=60, checkpoints=str(tmp_path), every=5)
    killer = Killer(tmp_path, 3, seed=1)
    check(disturbed_run(planned(4), settings, killer), killer, steps=60)


@pytest.mark.slow
def test_a_stopped_worker_is_named_and_left_behind(tmp_path: Path) -> None:
    settings = RunSettings(steps=40, checkpoints=str(tmp_path), every=5)
    killer = Killer(tmp_path, 1, seed=0, sizes=(2, 1), moments=("step",), how=signal.SIGSTOP)
    thread = killer.start()
    try:
        survived = run_surviving(
            planned(2), settings, hosts=Hosts(timeout_s=20), progress=killer.follow, count_devices=killer.devices
        )
    finally:
        killer.stop()
        thread.join(10)
    check(survived, killer, steps=40)
    assert f"rank {killer.kills[0].rank}" in survived.restarts[0].cause


def failing(error: WorkerError, calls: list[Plan]) -> Callable[..., object]:
    """In place of `run_plan`: notes the plan and fails."""

    def run(plan: Plan, *_: object, **__: object) -> object:
        calls.append(plan)
        raise error

    return run


def test_a_failure_that_repeats_leaves_devices_behind_and_then_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Plan] = []
    error = WorkerError("rank 0 was killed by SIGKILL", rank=0, is_lost=True)
    monkeypatch.setattr("autopar.planner.recover.run_plan", failing(error, calls))
    settings = RunSettings(steps=4, checkpoints=str(tmp_path))
    with pytest.raises(WorkerError, match="given up at step 0: 5 failures without a new checkpoint; the last: rank 0"):
        run_surviving(planned(2), settings, policy=Policy(max_failures=4, patience=2))
    assert [plan.decisions.num_gpus for plan in calls] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("error", "checkpoints"),
    [(WorkerError("rank 0 failed: ValueError", rank=0), "here"), (WorkerError("rank 0 was killed", is_lost=True), "")],
)
def test_an_error_of_the_code_or_a_run_without_checkpoints_is_not_repeated(
    error: WorkerError, checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Plan] = []
    monkeypatch.setattr("autopar.planner.recover.run_plan", failing(error, calls))
    settings = RunSettings(steps=4, checkpoints=checkpoints and str(tmp_path))
    with pytest.raises(WorkerError, match=r"rank 0"):
        run_surviving(planned(2), settings)
    assert len(calls) == 1


def test_a_plan_for_fewer_devices_keeps_its_microbatches() -> None:
    plan = planned(4)
    again = plan_again(plan, 3)
    assert again.decisions.num_gpus == 3
    assert again.decisions.num_microbatches == plan.decisions.num_microbatches
    assert again.model == plan.model


@pytest.mark.slow
def test_torchrun_restarts_and_plans_for_the_processes_it_has(tmp_path: Path) -> None:
    save_plan(planned(4), tmp_path / "plan.json")
    run = f"--steps 400 --checkpoint {tmp_path / 'ck'} --checkpoint-every 20 --json".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "2", "-m", "autopar", "run", str(tmp_path / "plan.json"), *run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while not (tmp_path / "ck" / "latest").exists():
            assert process.poll() is None
            time.sleep(0.05)
        victim, *_ = (worker for worker, rank in workers_of(process.pid, b"run").items() if rank == 1)
        os.kill(victim, signal.SIGKILL)
        text, _ = process.communicate()
    assert process.returncode == 0
    report = json.loads(text)
    assert report["num_processes"] == 2
    assert report["first_step"] >= 20
    assert sorted(losses_of(tmp_path / "ck")) == list(range(1, 401))
    assert not is_alive(victim)
