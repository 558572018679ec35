"""The cache of finished commands: found again while nothing has changed, made anew when anything has."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.ir.solution import Objective
from autopar.planner import manifest, recall
from autopar.planner.cache import cache_directory
from autopar.planner.manifest import Manifest, watch_files
from autopar.planner.plan import CapturedGraph
from autopar.planner.recall import Command, finished_plan
from autopar.planner.request import PlanRequest

MODEL = """
import json, os
import torch
from {helper} import WIDTH

SCALE = json.load(open("sizes.json"))["scale"]
try:
    open("optional.txt")
except FileNotFoundError:
    pass

def build_model(*, width: int = 4):
    inner = SCALE * width
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, inner), torch.nn.ReLU(), torch.nn.Linear(inner, 2))

def example_batch(*, batch: int = 8):
    return torch.zeros(batch, WIDTH)

def loss(output, batch):
    return output.square().mean()
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Plans `model.py`, which imports a helper and reads a file, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    helper = f"helper_{tmp_path.name}"
    (tmp_path / f"{helper}.py").write_text("WIDTH = 4\n")
    (tmp_path / "sizes.json").write_text('{"scale": 2}')
    (tmp_path / "model.py").write_text(MODEL.format(helper=helper))
    return Command("model.py", {}, PlanRequest(2, gpu="l4", profile="none"))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry per capture."""
    calls: list[str] = []
    original = recall.capture_graph

    def counted(*arguments: object) -> CapturedGraph:
        calls.append("capture")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(recall, "capture_graph", counted)
    return calls


def test_the_second_run_neither_captures_nor_searches(
    command: Command, captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = finished_plan(command)
    monkeypatch.setattr(recall, "make_plan", None)
    second = finished_plan(command)
    assert (first.is_recalled, second.is_recalled) == (False, True)
    assert (second.plan_text, second.report) == (first.plan_text, first.report)
    assert captures == ["capture"]


def test_another_question_about_the_same_model_does_not_capture_again(command: Command, captures: list[str]) -> None:
    finished_plan(command)
    for request in (
        replace(command.request, num_gpus=4),
        replace(command.request, objective=Objective("energy")),
        replace(command.request, gpu="h100-sxm-80gb"),
    ):
        fresh = finished_plan(replace(command, request=request))
        bare = finished_plan(replace(command, request=request, use_cache=False))
        assert not fresh.is_recalled
        assert _lasting(fresh.report) == _lasting(bare.report)
    assert captures == ["capture"]


def _lasting(report: str) -> list[str]:
    """Without the search's wall time."""
    return [line for line in report.splitlines() if "bound" not in line]


def _edit_helper(directory: Path) -> None:
    (helper,) = directory.glob("helper_*.py")
    helper.write_text("WIDTH = 4  # as before\n")


CHANGES: dict[str, Callable[[Path], object]] = {
    "source": lambda d: (d / "model.py").write_text((d / "model.py").read_text() + "\n# more\n"),
    "imported module": _edit_helper,
    "file that the model reads": lambda d: (d / "sizes.json").write_text('{"scale": 4}'),
    "file that was not there": lambda d: (d / "optional.txt").write_text(""),
    "file that is gone": lambda d: (d / "sizes.json").rename(d / "away.json"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_what_the_model_reads_is_seen(
    what: str, command: Command, captures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_plan(command)
    CHANGES[what](tmp_path)
    monkeypatch.setattr(recall, "capture_graph", lambda *_: captures.append("again") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finished_plan(command)
    assert captures == ["capture", "again"]


def test_options_batch_code_and_place_are_part_of_the_key(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [recall._graph_key(command)]
    keys.append(recall._graph_key(replace(command, options={"width": "8"})))
    keys.append(recall._graph_key(replace(command, request=replace(command.request, batch_size=4))))
    keys.append(recall._graph_key(replace(command, source="./model.py")))
    monkeypatch.setattr(recall, "own_hash", lambda: "edited")
    keys.append(recall._graph_key(command))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    keys.append(recall._graph_key(command))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    keys.append(recall._graph_key(command))
    assert len(set(keys)) == len(keys)


def _damage(how: Callable[[bytes], bytes]) -> None:
    for path in cache_directory().rglob("*"):
        if path.is_file():
            path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize(
    "how",
    [
        lambda _: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + b"x" * 9,
        lambda _: b"\xff" * 9,
        lambda data: data[:64] + b"\n",
    ],
)
def test_a_damaged_entry_counts_as_absent(command: Command, captures: list[str], how: Callable[[bytes], bytes]) -> None:
    first = finished_plan(command)
    _damage(how)
    second = finished_plan(command)
    assert not second.is_recalled
    assert _lasting(second.report) == _lasting(first.report)
    assert captures == ["capture", "capture"]
    assert finished_plan(command).is_recalled


def test_a_cache_that_cannot_be_written_is_no_error(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert not finished_plan(command).is_recalled
    assert not finished_plan(command).is_recalled


def test_no_cache_neither_reads_nor_writes(command: Command) -> None:
    bare = replace(command, use_cache=False)
    finished_plan(bare)
    assert not cache_directory().exists()
    finished_plan(command)
    assert not finished_plan(bare).is_recalled


def test_a_search_stopped_by_its_time_limit_is_not_kept(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = replace(command, request=replace(command.request, time_limit_s=60.0))
    assert not finished_plan(limited).is_recalled
    assert finished_plan(limited).is_recalled  # it was not stopped
    original = recall.make_plan

    def stopped(*arguments: object, **named: object) -> object:
        planned = original(*arguments, **named)  # type: ignore[arg-type]
        solver = replace(planned.plan.solver, status="feasible", gap=0.5)
        return replace(planned, plan=replace(planned.plan, solver=solver))

    monkeypatch.setattr(recall, "make_plan", stopped)
    other = replace(command, request=replace(command.request, time_limit_s=61.0))
    assert not finished_plan(other).is_recalled
    assert not finished_plan(other).is_recalled


def test_many_writers_and_readers_of_one_entry_see_whole_entries() -> None:
    entries = [recall._Entry(Manifest({}, {}), {"plan": f"{i}" * 50_000}) for i in range(4)]

    def work(i: int) -> bool:
        recall._store("plans/one", entries[i % 4])
        found = recall._load("plans/one")
        return found in entries

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    assert [path.name for path in (cache_directory() / "plans").iterdir()] == ["one"]


def test_the_oldest_entries_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MAX_ENTRIES", 3)
    for i in range(5):
        recall._store(f"plans/{i}", recall._Entry(Manifest({}, {}), {}))
        os.utime(cache_directory() / "plans" / str(i), ns=(i, i))
    recall._store("plans/5", recall._Entry(Manifest({}, {}), {}))
    assert sorted(path.name for path in (cache_directory() / "plans").iterdir()) == ["3", "4", "5"]


def test_a_watch_notes_reads_and_not_writes(tmp_path: Path) -> None:
    (tmp_path / "read").write_text("1")
    with watch_files() as watch:
        (tmp_path / "read").read_text()
        (tmp_path / "written").write_text("2")
        assert not (tmp_path / "asked").exists()
        with pytest.raises(FileNotFoundError):
            (tmp_path / "missing").read_text()
    (tmp_path / "written").read_text()
    assert {str(tmp_path / name) for name in ("read", "missing")} == {
        path for path in watch.opened if path.startswith(str(tmp_path))
    }
    assert watch.manifest().still_holds()
    (tmp_path / "read").write_text("3")
    assert not watch.manifest().still_holds()


def test_a_manifest_sees_a_renewed_library(tmp_path: Path) -> None:
    library = tmp_path / "__init__.py"
    library.write_text("a")
    held = Manifest({}, {str(library): manifest._stamp(str(library))})
    assert held.still_holds()
    os.utime(library, ns=(1, 1))
    assert not held.still_holds()
