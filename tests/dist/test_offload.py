"""What is offloaded changes no bit: not under any known plan, not with masters, not over a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist


def rows_of(work: str, **arguments: Any) -> list[dict[str, Any]]:
    return [row for rank in run_on(2, f"tests.dist.offload_worker:{work}", arguments) for row in rank]


def check(rows: list[dict[str, Any]], at_least: int) -> None:
    assert len(rows) >= 2 * at_least
    assert [row["case"] for row in rows if not row["same"]] == []


def test_offloaded_plans_compute_every_bit_of_those_that_are_not() -> None:
    check(rows_of("offload_cases", models=["toy/transformer"]), at_least=12)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy/conv", "toy/dropout", "toy/skip", "gpt2"])
def test_offloaded_plans_of_other_models_do_so_too(model: str) -> None:
    check(rows_of("offload_cases", models=[model]), at_least=12)


def test_masters_have_no_memory_on_the_device_between_steps() -> None:
    rows = rows_of("master_cases", model="toy/transformer", plans=["zero1", "zero3", "1f1b recompute"])
    check(rows, at_least=6)
    assert {row["left_bytes"] for row in rows} == {0}


def test_checkpoints_of_offloaded_runs_load_with_and_without_offload(tmp_path: Path) -> None:
    rows = rows_of("checkpoint_cases", model="toy/transformer", plans=["zero1", "tensor"], directory=str(tmp_path))
    check(rows, at_least=6)
