"""Workers live and die together, and the first failure is the one that is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autopar.errors import WorkerError
from autopar.runtime.launch import Job, launch_local

pytestmark = pytest.mark.dist
CASES = "tests.dist.collective_cases"


def test_an_exception_names_the_rank_and_the_reason() -> None:
    with pytest.raises(WorkerError, match=r"rank 1 failed: ValueError: a broken shard"):
        launch_local(Job(f"{CASES}:fail_on_one_rank", {}, 2), timeout_s=60)


def test_a_killed_worker_is_named_and_the_others_are_ended() -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 was killed by SIGKILL"):
        launch_local(Job(f"{CASES}:die_on_one_rank", {}, 2), timeout_s=60)
    assert time.monotonic() - started < 60


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="still running: ranks 0"):
        launch_local(Job(f"{CASES}:report_processes", {"directory": str(tmp_path)}, 1), timeout_s=6)
    assert not any(_is_alive(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background\n"
        "from autopar.runtime.launch import Job, launch_local\n"
        f"launch_local(Job('{CASES}:report_processes', {{'directory': {str(tmp_path)!r}}}, 2))"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    _wait_for(lambda: len(list(tmp_path.iterdir())) == 2, seconds=60)
    parent.send_signal(how)
    parent.wait(30)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    _wait_for(lambda: not any(map(_is_alive, workers)), seconds=20)


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
