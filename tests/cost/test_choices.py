"""Choices of ops under pins."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.cost.choices import ChoiceMaker
from autopar.ir.graph import OpGraph
from autopar.ir.solution import Pins
from autopar.planner.plan import capture_graph
from autopar.rules.batch import batch_dims

MODEL = str(Path(__file__).parents[2] / "examples" / "gpt2.py")
SIZES = {"layers": "2", "hidden": "16", "heads": "2", "seq": "8", "vocab": "32", "batch": "4"}


@pytest.fixture(scope="module")
def gpt2() -> OpGraph:
    return capture_graph(MODEL, SIZES, None).graph


@pytest.mark.parametrize(("active", "axis"), [((True, False), 0), ((False, False, True, False), 2)])
def test_weights_that_are_viewed_may_keep_their_gradient_pending(
    gpt2: OpGraph, active: tuple[bool, ...], axis: int
) -> None:
    """GPT-2's layers read transposed weights: their gradients too are summed once a step, not once a microbatch."""
    maker = ChoiceMaker(gpt2, Pins(dp=2, tp=1, pp=1, ep=1, cp=2), batch_dims(gpt2))
    viewed = [op for op in gpt2.ops if [gpt2.values[name].origin for name in op.inputs] == ["parameter"]]
    assert len(viewed) >= 8
    for op in viewed:
        labels = {choice[axis].label for choice in maker.op(op, active).grid.choices}
        assert labels == {"replicate", "follow"}
