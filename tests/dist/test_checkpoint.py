"""Checkpoints: bit by bit under the same plan, tensor by tensor under any other, whole after any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopar.runtime.launch import Job, launch_local

pytestmark = pytest.mark.dist
WORKER = "tests.dist.checkpoint_worker"


def run(work: str, num_processes: int, **arguments: Any) -> list[Any]:
    return launch_local(Job(f"{WORKER}:{work}", arguments, num_processes), timeout_s=300)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_resumed_run_repeats_every_bit(is_async: bool, tmp_path: Path) -> None:
    models = ["toy/transformer"] if is_async else ["toy/transformer", "toy/conv", "toy/dropout"]
    rows = run("resume_cases", 2, directory=str(tmp_path), models=models, count=2, is_async=is_async)
    cases = [row for rank in rows for row in rank]
    assert len(cases) >= 2 * 9 * len(models)
    assert [row["case"] for row in cases if not row["same"]] == []
    assert {row["step"] for row in cases} == {2}


@pytest.mark.parametrize("model", ["toy/transformer", "toy/conv"])
def test_a_checkpoint_of_two_ranks_loads_under_any_plan_of_four(model: str, tmp_path: Path) -> None:
    losses = run("train_and_save", 2, directory=str(tmp_path / "two"), model=model)[0]
    source = tmp_path / "two" / "step_00000002"
    rows = run("reshard_cases", 4, directory=str(tmp_path), source=str(source), model=model, count=2)
    assert len(rows[0]) >= 9
    assert [row["case"] for rank in rows for row in rank if not row["same"]] == []
    assert all(abs(row["loss"] - losses[0]) <= 1e-10 * abs(losses[0]) for row in rows[0])
