"""Plans drawn from all that the search may choose compute the serial step; `benchmarks/matrix.py` runs many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.rules.redistribute import FORWARD
from benchmarks.matrix import draw_pairs, subjects, verify_pairs
from benchmarks.matrix_space import Subject

pytestmark = pytest.mark.dist
NUM_PAIRS = 10
GENERATED = str(Path(__file__).parent / "generated.py")


def models() -> list[Subject]:
    """One example, and a made-up network with attention, norms and a tied embedding."""
    return [*subjects(["mlp"]), Subject("generated", GENERATED, {"layers": "attention+,mlp+,norm,attention+,mlp+"})]


def test_drawn_plans_compute_the_serial_step() -> None:
    pairs = draw_pairs(models(), 2, NUM_PAIRS)[0][:NUM_PAIRS]
    assert {pair.decisions.num_ranks for pair in pairs} == {1, 2}
    verdicts = verify_pairs(pairs, 2, lambda verdict: None)
    assert len(verdicts) == NUM_PAIRS
    assert not [str(verdict) for verdict in verdicts if not verdict.passed]


def test_drawing_reaches_all_that_the_search_may_choose() -> None:
    pairs, missing = draw_pairs(models(), 4, 20)
    assert missing == set()
    assert all(pair.plan().decisions == pair.decisions for pair in pairs[::7])
    drawn = set().union(*(pair.features for pair in pairs))
    assert {f"move {a} > {b} with gradient" for a, b in FORWARD} <= drawn
    assert {f"parameter {a} x {b}" for a in ("zero1", "zero3") for b in ("sharded", "replicated")} <= drawn
    assert {"linear by contract", "linear by columns", "interleaved by 2", "axis cp of 4", "cuts uneven"} <= drawn
