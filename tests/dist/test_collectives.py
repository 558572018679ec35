"""Collectives and their conjugates on 2 and 3 processes."""

from __future__ import annotations

import pytest

from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist
BFLOAT16_TERMS = 0.1
"""Terms of a pending sum are random fractions, rounded to 8 bits."""


@pytest.mark.parametrize("num_processes", [2, 3])
def test_every_step_moves_value_and_gradient_as_its_placements_say(num_processes: int) -> None:
    for results in run_on(num_processes, "tests.dist.collective_cases:run", {}):
        assert len(results) > 60
        wrong = {r["case"]: r["error"] for r in results if r["error"] > _tolerance(r["case"])}
        assert not wrong


def _tolerance(case: str) -> float:
    return BFLOAT16_TERMS if "bfloat16" in case else 1e-14
