"""Checkpoints: bit by bit under the same plan, tensor by tensor under any other, whole after any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopar.runtime.launch import Job, launch_local
from tests.dist.checkpoint_worker import train_and_save

pytestmark = pytest.mark.dist
WORKER = "tests.dist.checkpoint_worker"


def run(work: str, num_processes: int, **arguments: Any) -> list[Any]:
    return launch_local(Job(f"{WORKER}:{work}", arguments, num_processes), timeout_s=300)


@pytest.mark.parametrize(
    ("models", "is_async"),
    [
        (["toy/dropout"], True),
        pytest.param(["toy/transformer", "toy/conv", "toy/deep"], False, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_repeats_every_bit(models: list[str], is_async: bool, tmp_path: Path) -> None:
    rows = run("resume_cases", 2, directory=str(tmp_path), models=models, count=2, is_async=is_async)
    cases = [row for rank in rows for row in rank]
    assert len(cases) >= 2 * 9 * len(models)
    assert [row["case"] for row in cases if not row["same"]] == []
    assert {row["step"] for row in cases} == {2}


@pytest.mark.parametrize(
    ("model", "num_processes"),
    [("toy/conv", 2), *(pytest.param(model, 4, marks=pytest.mark.slow) for model in ("toy/transformer", "toy/conv"))],
)
def test_a_checkpoint_of_one_process_loads_under_any_plan(model: str, num_processes: int, tmp_path: Path) -> None:
    losses = train_and_save({"directory": str(tmp_path / "one"), "model": model})
    source = tmp_path / "one" / "step_00000002"
    arguments = {"directory": str(tmp_path), "source": str(source), "model": model}
    rows = run("reshard_cases", num_processes, **arguments, count=2)
    assert len(rows[0]) >= 8
    assert [row["case"] for rank in rows for row in rank if not row["same"]] == []
    assert all(abs(row["loss"] - losses[0]) <= 1e-10 * abs(losses[0]) for row in rows[0])
    assert all(row["loss of its rows"] == row["loss"] for rank in rows for row in rank)
    assert any(len(row["rows"]) < 8 for row in rows[0])
