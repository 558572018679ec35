"""A rank that hangs is named once, and the run goes on from its last checkpoint, by itself or restarted by torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from autopar.cli.app import invoke
from autopar.ir.plan import Plan
from autopar.ir.serialize import save_plan
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.runtime.pulse import FACTOR, SLACK_S, Pulse
from tests.dist import hanging

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"width": "32", "batch": "16", "samples": "400"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
WAITED = r"rank {} waited \d+ s in \w+ \([\w.]+ in \w+\.py\): rank {} on node 0 \([\w.]+\) {}"
LOST = r"rank 0 (lost a connection|was ended) in .* rank 1 on node 0 \(\w+\) silent for \d+ s; the process is"
HUNG, SILENT = "lives but did not come to it: hung", r"silent for \d+ s; the process is stopped"


@pytest.fixture(scope="module")
def plan() -> Plan:
    request = PlanRequest(num_gpus=2, gpu="cpu", use_all=True, with_baselines=False)
    return plan_model(hanging.__file__, OPTIONS, request)


def disturbance(tmp_path: Path, rank: int, how: str, *, once: bool = True) -> dict[str, str]:
    """Environment of a run of which a rank leaves."""
    found = {"HANG_RANK": str(rank), "HANG_HOW": how, "HANG_KEPT": str(tmp_path / "kept")}
    return found | {"PYTHONPATH": str(ROOT)} | ({"HANG_ONCE": str(tmp_path / "gone")} if once else {})


def history(directory: Path) -> dict[int, list[str]]:
    """The losses that each step had, as they were written."""
    found: dict[int, list[str]] = {}
    for step, loss, *_ in (line.split(",") for line in (directory / "history.csv").read_text().splitlines()):
        found.setdefault(int(step), []).append(loss)
    return found


def check_repeated(found: Mapping[int, list[str]]) -> None:
    """All steps are there; those after the last checkpoint were done twice, bit by bit alike.

    The rank that stays may come to further steps, up to the next one that it cannot take alone.
    """
    assert sorted(found) == list(range(1, hanging.STEPS + 1))
    again = [step for step, losses in found.items() if len(losses) > 1]
    assert again == list(range(hanging.EVERY + 1, max(again) + 1))
    assert hanging.AT - 1 <= max(again) <= 2 * hanging.EVERY
    assert all(len(set(losses)) == 1 for losses in found.values())


def run_to_its_end(plan: Plan, tmp_path: Path, *options: str) -> int:
    save_plan(plan, tmp_path / "plan.json")
    kept = ("--checkpoint", str(tmp_path / "kept"), "--timeout", "7", "--steps", str(hanging.STEPS))
    return invoke(["run", str(tmp_path / "plan.json"), *kept, *options])


@pytest.mark.parametrize(
    "case",
    [
        (1, "sleep", WAITED.format(0, 1, HUNG)),
        pytest.param((1, "stop", WAITED.format(0, 1, SILENT)), marks=pytest.mark.slow),
        pytest.param((0, "stop", r"rank 1 .*rank 0 on node 0 .*, where the run meets, silent"), marks=pytest.mark.slow),
    ],
    ids=["sleeps", "stopped", "stopped with the store"],
)
def test_a_run_goes_on_without_a_person(
    case: tuple[int, str, str],
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rank, how, told = case
    for name, value in disturbance(tmp_path, rank, how).items():
        monkeypatch.setenv(name, value)
    assert run_to_its_end(plan, tmp_path, "--checkpoint-every", str(hanging.EVERY), "--max-failures", "1") == 0
    said = capsys.readouterr().err.splitlines()
    (failure,) = (line for line in said if "going on from step" in line)
    assert re.match(told, failure)
    assert failure.endswith(f"going on from step {hanging.EVERY} with 2 processes")
    check_repeated(history(tmp_path / "kept"))


@pytest.mark.slow
def test_a_rank_that_hangs_each_time_is_left_behind(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in disturbance(tmp_path, 1, "sleep", once=False).items():
        monkeypatch.setenv(name, value)
    assert run_to_its_end(plan, tmp_path) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "going on from step" in line]
    assert [line.rpartition("with ")[2] for line in said] == ["2 processes", "2 processes", "1 process"]
    assert len(history(tmp_path / "kept")) == hanging.STEPS


@pytest.mark.slow
def test_one_process_that_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.runtime.pulse.SLACK_S", 2.0)
    for name, value in disturbance(tmp_path, 0, "stop").items():
        monkeypatch.setenv(name, value)
    alone = plan_model(hanging.__file__, OPTIONS, PlanRequest(num_gpus=1, gpu="cpu", with_baselines=False))
    assert run_to_its_end(alone, tmp_path, "--checkpoint-every", str(hanging.EVERY)) == 0
    check_repeated(history(tmp_path / "kept"))


def told_under_torchrun(command: tuple[str, ...], environment: dict[str, str]) -> tuple[int, str, list[str]]:
    """Exit code, what it printed, and the messages among it."""
    found = subprocess.run(
        [*TORCHRUN, *command], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=500
    )
    return found.returncode, found.stdout, re.findall(r"^autopar: .*$", found.stderr, re.MULTILINE)


def test_under_torchrun_a_lost_rank_is_one_message(tmp_path: Path) -> None:
    code, said, messages = told_under_torchrun(("-m", "tests.dist.lost_rank"), {"PYTHONPATH": str(ROOT)})
    assert (code, said) == (1, "")
    assert len(messages) == 1
    assert re.match("autopar: " + LOST, messages[0])


@pytest.mark.slow
@pytest.mark.parametrize(("how", "told"), [("kill", LOST), ("sleep", WAITED.format(0, 1, HUNG))])
def test_under_torchrun_a_lost_rank_is_one_message_and_a_restart(
    how: str, told: str, plan: Plan, tmp_path: Path
) -> None:
    save_plan(plan, tmp_path / "plan.json")
    run = ("run", str(tmp_path / "plan.json"), "--timeout", "8", "--steps", str(hanging.STEPS))
    run = (*run, "--checkpoint", str(tmp_path / "kept"), "--checkpoint-every", str(hanging.EVERY))
    code, _, messages = told_under_torchrun(
        ("--max-restarts", "1", "-m", "autopar", *run), disturbance(tmp_path, 1, how)
    )
    assert code == 0
    assert len(messages) == 1
    assert re.match("autopar: " + told, messages[0])
    check_repeated(history(tmp_path / "kept"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "sleep"])
def test_a_loop_of_ones_own_goes_on_where_torchrun_restarts_it(how: str, tmp_path: Path) -> None:
    code, said, messages = told_under_torchrun(("--max-restarts", "1", hanging.__file__), disturbance(tmp_path, 1, how))
    assert code == 0
    assert len(messages) == 1
    assert re.match("autopar: rank 0 .* rank 1 on node 0", messages[0])
    found: dict[int, list[str]] = {}
    for step, loss in re.findall(r"^step (\d+) loss (\S+)$", said, re.MULTILINE):
        found.setdefault(int(step) + 1, []).append(loss)
    check_repeated(found)


def test_adapting_is_not_for_torchrun(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert run_to_its_end(plan, tmp_path, "--adapt") == 2


def test_silence_is_held_against_the_longest_step() -> None:
    now = 0.0
    pulse = Pulse(60.0, lambda: now)
    pulse.hear("taken up at step 5")
    now = 10_000.0
    assert not pulse.fault()
    pulse.hear("step 6/30: loss 1, 9000 s")
    now += 20_000.0
    assert not pulse.fault()  # the second may compile as well
    pulse.hear("step 7/30: loss 1, 12 s")
    now += FACTOR * 20_000.0 - 1
    assert not pulse.fault()
    now += 2
    assert re.match(r"no step for 200001 s after step 7, of which none took longer than 2e\+04 s: hung", pulse.fault())
    quick = Pulse(60.0, lambda: now)
    for step in (1, 2, 3):
        now += 0.1
        quick.hear(f"step {step}/4: loss 1, 0.1 s")
    now += 60.0 + SLACK_S - 1
    assert not quick.fault()
    now += 2
    assert quick.fault()
    quick.hear("step 4/4: loss 1, 0.1 s")
    now += 10_000.0
    assert not quick.fault()  # what is left to do has no steps
