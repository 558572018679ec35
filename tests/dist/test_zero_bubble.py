"""Backward in two halves computes the serial step: loss, every gradient, every buffer, in float64."""

from __future__ import annotations

import pytest

from autopar.ir.solution import RECOMPUTE
from tests.dist.test_decisions import check, errors_on

pytestmark = pytest.mark.dist


def test_two_stages_under_every_policy_of_recompute() -> None:
    errors = errors_on(2, "zero_bubble:pipeline_cases", models=("gpt2",), microbatches=[4], policies=RECOMPUTE)
    check(errors, at_least=5)


def test_four_ranks_alone_and_two_by_two() -> None:
    """A pipeline of four stages, and data, ZeRO and tensor parallelism inside stages of two ranks."""
    check(errors_on(4, "zero_bubble:four_rank_cases", models=("gpt2",), policies=("none",), every=3), at_least=6)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_pipelines_of_more_models(num_processes: int) -> None:
    models = ("gpt2", "llama", "t5", "toy/deep", "toy/dropout", "toy/transformer")
    arguments = {"models": models, "microbatches": [4, 8], "policies": RECOMPUTE}
    check(errors_on(num_processes, "zero_bubble:pipeline_cases", **arguments), at_least=40)


@pytest.mark.slow
def test_stages_of_several_ranks_with_sums_that_overlap() -> None:
    check(errors_on(4, "zero_bubble:mixed_cases", models=("gpt2", "toy/transformer"), every=1), at_least=30)
