"""Commands as processes: interrupted, terminated, with a worker killed, with a reader that leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.helpers import MODEL

ROOT = Path(__file__).resolve().parent.parent.parent
HEED_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""A shell that runs the tests in the background has its children ignore SIGINT; a user's terminal does not."""
COMMAND = [sys.executable, "-c", HEED_INTERRUPTS + "from autopar.cli import main; main()"]
PATIENCE_S = 90.0

SLOW_MODEL = """
import pathlib, time
import torch

def build_model():
    pathlib.Path("started").touch()
    time.sleep(600)

def example_batch():
    return torch.zeros(8, 4)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `autopar` in `tmp_path`, which holds `model.py`."""
    (tmp_path / "model.py").write_text(MODEL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment |= {"AUTOPAR_PROFILE": str(tmp_path / "store.jsonl")}
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    """Direct children of a process, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_plan_leaves_nothing(
    number: int, code: int, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "model.py").write_text(SLOW_MODEL)
    process = start("plan", "model.py", "--gpus", "2")
    _until((tmp_path / "started").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["model.py", "started"]


@pytest.fixture
def running(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> tuple[subprocess.Popen[str], list[int]]:
    """A run of many steps on two workers, in the middle of it."""
    planned = start("plan", "model.py", "--gpus", "2", "--gpu", "l4", "--use-all")
    _, err = planned.communicate(timeout=PATIENCE_S)
    assert planned.returncode == 0, err
    process = start("run", "plan.json", "--steps", "1000000")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    workers = _children(process.pid)
    assert len(workers) == 2
    return process, workers


@pytest.mark.dist
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_no_process(
    number: int, code: int, tmp_path: Path, running: tuple[subprocess.Popen[str], list[int]]
) -> None:
    process, workers = running
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert "Traceback" not in err
    _until(lambda: all(map(_is_gone, workers)))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("autopar-")] == []


@pytest.mark.dist
def test_a_killed_worker_ends_the_run_and_is_named(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = running
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in err
    assert "Traceback" not in err
    _until(lambda: all(map(_is_gone, workers)))


@pytest.mark.dist
def test_workers_end_when_their_parent_is_killed(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = running
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    _until(lambda: all(map(_is_gone, workers)))


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -c 'from autopar.cli import main; main()' gpus --json | true"
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
