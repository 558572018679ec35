"""Two hosts with addresses of their own train together, tell a cut link in one message, and go on when it heals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.app import invoke
from tests.dist import two_hosts

pytestmark = pytest.mark.dist
ROOT = Path(__file__).resolve().parents[2]
UNSHARE = ["unshare", "-nm"] if os.geteuid() == 0 else ["unshare", "-rnm"]


def _why_not() -> str:
    """Why there are no network namespaces here; "" if there are."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "ss", "mount") if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]} on this machine"
    trial = "mount -t tmpfs none /run && ip netns add x && ip link add v0 netns x type veth peer name v1"
    found = subprocess.run([*UNSHARE, "sh", "-c", trial], capture_output=True, text=True, check=False, timeout=60)
    return f"no network namespaces: {found.stderr.strip()}" if found.returncode else ""


@pytest.fixture(scope="module")
def _namespaces() -> None:
    if reason := _why_not():
        pytest.skip(reason)


@pytest.fixture
def make_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a plan of a small model with the pins given."""
    monkeypatch.setenv("AUTOPAR_PROFILE", str(tmp_path / "store.jsonl"))

    def make(gpus: int, pins: str) -> str:
        path = tmp_path / "plan.json"
        model = ["plan", str(ROOT / "examples/mlp.py"), "--set", "hidden=32", "--set", "inputs=16", "--batch", "8"]
        code = invoke([*model, "--gpu", "cpu", "--gpus", str(gpus), "--use-all", "--pin", pins, "--out", str(path)])
        assert code == 0
        return str(path)

    return make


def on_two_hosts(scenario: str, *arguments: str) -> dict[str, Any]:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [*UNSHARE, sys.executable, two_hosts.__file__, scenario, *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=550)
    assert found.returncode == 0, found.stderr
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def losses(text: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+)/\d+: loss (\S+),", text, re.MULTILINE)}


@pytest.mark.usefixtures("_namespaces")
def test_a_cut_link_is_one_message_on_each_host() -> None:
    run = on_two_hosts("cut", "-")["first"]
    check_one_message(run)
    local = {line.split()[3].rpartition(":")[0] for line in run["listening"]}
    assert local == {two_hosts.ADDRESSES[0]}
    assert run["reaches"] == {two_hosts.ADDRESSES[0]: True, two_hosts.OTHER_ADDRESS: False}


@pytest.mark.slow
@pytest.mark.usefixtures("_namespaces")
def test_a_plan_is_verified_over_two_hosts(make_plan: Any) -> None:
    found = on_two_hosts("verify", make_plan(4, "dp=2,pp=2"), "--json")["first"]
    assert (found["codes"], found["left"]) == ([0, 0], [])
    here, there = (json.loads(text) for text in found["texts"])
    assert here == there
    assert here["num_processes"] == 4
    assert max(here["loss_error"], here["worst_gradient_error"]) <= 1e-10


@pytest.mark.slow
@pytest.mark.usefixtures("_namespaces")
def test_training_tells_a_cut_link_and_resumes_once_it_has_healed(make_plan: Any, tmp_path: Path) -> None:
    keep = ("--checkpoint", str(tmp_path / "kept"), "--checkpoint-every", "2", "--max-failures", "0")
    found = on_two_hosts("again", make_plan(2, "dp=2"), *keep)
    first, second = found["first"], found["second"]
    check_one_message(first)
    assert (second["codes"], second["left"]) == ([0, 0], [])
    before, after = losses(first["texts"][0]), losses(second["texts"][0])
    assert max(after) == max(before) + two_hosts.MORE
    assert min(after) >= max(before) - 2  # one past a checkpoint, of which one may have been under way
    assert {step: before[step] for step in before.keys() & after.keys()} == {
        step: after[step] for step in before.keys() & after.keys()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("_namespaces")
@pytest.mark.parametrize(
    ("mishap", "here", "there"),
    [
        ("waiting", r"rank \d waited 7 s in", r"rank \d waited 7 s in"),
        ("killed", r"rank \d lost a connection in .* on node 1", r"rank \d was killed by SIGKILL"),
    ],
)
def test_runs_that_keep_checkpoints_go_on_by_themselves(
    mishap: str, here: str, there: str, make_plan: Any, tmp_path: Path
) -> None:
    keep = ("--checkpoint", str(tmp_path / "kept"), "--checkpoint-every", "100")
    found = on_two_hosts(mishap, make_plan(4, "dp=2,pp=2"), *keep)["first"]
    assert (found["codes"], found["left"]) == ([0, 0], [])
    for text, told in zip(found["texts"], (here, there), strict=True):
        assert len(re.findall(told, text.partition("going on from step")[0])) == 1
    assert max(losses(found["texts"][0])) == 400


def check_one_message(run: dict[str, Any]) -> None:
    """Both hosts end in time, each with one line which names who waited, in what, for whom.

    What the message costs beyond the wait, on a machine that may do much else, is not judged.
    """
    assert run["codes"] == [1, 1]
    assert max(run["ended_s"]) <= two_hosts.TIMEOUT_S + two_hosts.SLACK_S
    assert run["left"] == []
    for host, text in enumerate(run["texts"]):
        told = [line for line in text.splitlines() if line.startswith("autopar: ")]
        assert len(told) == 1
        here, there = (f"rank {rank} " for rank in (host, 1 - host))
        assert re.search(rf"{here}waited 7 s in \w+ \(\w[\w.]* in \w+\.py\): {there}on node", told[0])
        assert f"({two_hosts.ADDRESSES[1 - host]})" in told[0]
        assert "Traceback" not in text
