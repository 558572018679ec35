"""Checkpoints: bit by bit under the same plan, tensor by tensor under any other, whole after any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.checkpoint_worker import train_and_save
from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist
WORKER = "tests.dist.checkpoint_worker"


def run(work: str, num_processes: int, **arguments: Any) -> list[Any]:
    return run_on(num_processes, f"{WORKER}:{work}", arguments)


def saved_alone(model: str, directory: Path) -> dict[str, Any]:
    """A checkpoint of one process, as arguments; `loss` of the step after it."""
    losses = train_and_save({"directory": str(directory / "one"), "model": model})
    source = directory / "one" / "step_00000002"
    return {"directory": str(directory), "source": str(source), "model": model, "loss": losses[0]}


def check_resharded(rows: list[dict[str, Any]], loss: float) -> None:
    assert [row["case"] for row in rows if not row["same"]] == []
    assert all(abs(row["loss"] - loss) <= 1e-10 * abs(loss) for row in rows)
    assert all(row["loss of its rows"] == row["loss"] for row in rows)
    assert any(len(row["rows"]) < 8 for row in rows)


def test_a_run_repeats_every_bit_and_what_one_process_wrote_loads_in_parts(tmp_path: Path) -> None:
    arguments = saved_alone("toy/conv", tmp_path)
    rows = [row for rank in run("few_cases", 2, **arguments) for row in rank]
    resumed = [row for row in rows if "losses" in row]
    assert len(resumed) == 2 * 3
    assert [row["case"] for row in resumed if not row["same"]] == []
    check_resharded([row for row in rows if "losses" not in row], arguments["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_a_resumed_run_repeats_every_bit(is_async: bool, tmp_path: Path) -> None:
    models = ["toy/transformer", "toy/conv", "toy/deep", "toy/dropout"]
    rows = run("resume_cases", 2, directory=str(tmp_path), models=models, count=3, is_async=is_async)
    cases = [row for rank in rows for row in rank]
    assert len(cases) >= 2 * 10 * len(models)
    assert [row["case"] for row in cases if not row["same"]] == []
    assert {row["step"] for row in cases} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy/transformer", "toy/conv"])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_checkpoint_of_one_process_loads_under_any_plan(model: str, num_processes: int, tmp_path: Path) -> None:
    arguments = saved_alone(model, tmp_path)
    rows = run("reshard_cases", num_processes, **arguments, count=4)
    assert len(rows[0]) >= 10
    check_resharded([row for rank in rows for row in rank], arguments["loss"])
