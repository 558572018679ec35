"""Whatever the rules admit computes the serial step: loss, every gradient, every buffer, in float64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.ranks import run_on

pytestmark = pytest.mark.dist
TOLERANCE = 1e-10
TOYS = ("toy/skip", "toy/transformer", "toy/conv", "toy/dropout")
EXAMPLES = ("gpt2", "llama", "bert", "vit", "resnet", "alexnet", "t5", "mixtral", "unet", "mlp")


def errors_on(num_processes: int, work: str, **arguments: Any) -> dict[str, float]:
    """Largest error of each case over all ranks."""
    entry = work if ":" in work else f"worker:{work}"
    found = run_on(num_processes, f"tests.dist.{entry}", arguments)
    return {rows[0]["case"]: max(row["error"] for row in rows) for rows in zip(*found, strict=True)}


def check(errors: dict[str, float], at_least: int) -> None:
    assert len(errors) >= at_least
    assert not {case: error for case, error in errors.items() if not error <= TOLERANCE}


def test_every_strategy_of_every_rule_on_two_processes() -> None:
    check(errors_on(2, "rule_cases", count=99), at_least=300)


def test_pairs_of_strategies_on_a_mesh_of_two_by_two() -> None:
    check(errors_on(4, "rule_cases", count=2), at_least=150)


def test_known_plans_of_toy_models_on_two_processes() -> None:
    check(errors_on(2, "named_cases", models=TOYS), at_least=28)


def test_known_plans_of_toy_models_on_four_processes() -> None:
    check(errors_on(4, "named_cases", models=("toy/skip", "toy/transformer", "toy/conv")), at_least=21)


def test_random_decisions_for_toy_models_on_two_processes() -> None:
    check(errors_on(2, "random_cases", models=TOYS, microbatches=[1, 2], count=6, seed=0), at_least=48)


@pytest.mark.slow
def test_random_decisions_for_toy_models_on_four_processes() -> None:
    check(errors_on(4, "random_cases", models=TOYS, microbatches=[2], count=6, seed=1), at_least=24)


def test_random_decisions_for_the_example_models_on_two_processes() -> None:
    check(errors_on(2, "random_cases", models=EXAMPLES, microbatches=[2], count=2, seed=2), at_least=20)


@pytest.mark.slow
def test_random_decisions_for_the_example_models_on_four_processes() -> None:
    check(errors_on(4, "random_cases", models=EXAMPLES, microbatches=[4], count=10, seed=3), at_least=100)


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_split_of_the_sequence_passes_through_whole_models(num_processes: int) -> None:
    check(errors_on(num_processes, "sequence_cases", models=("gpt2", "llama")), at_least=2 * num_processes)


@pytest.mark.parametrize(("num_processes", "cases"), [(2, 3), (4, 12)])
def test_experts_split_over_ranks_by_sum_and_by_exchange(num_processes: int, cases: int) -> None:
    check(errors_on(num_processes, "expert_cases"), at_least=cases)


def test_recompute_policies_under_pipelines_gathering_and_splits() -> None:
    check(errors_on(2, "recompute_cases", models=("toy/dropout", "gpt2")), at_least=24)


def test_interleaved_pipelines_on_two_processes() -> None:
    check(errors_on(2, "interleaved_cases", models=("toy/transformer", "toy/deep", "toy/dropout")), at_least=12)


def test_interleaved_pipelines_on_four_processes() -> None:
    check(errors_on(4, "interleaved_cases", models=("toy/deep",)), at_least=8)


@pytest.mark.parametrize(("num_processes", "cases"), [(2, 28), (4, 18)])
def test_gradients_summed_while_backward_runs(num_processes: int, cases: int) -> None:
    models = ("toy/transformer", "toy/conv") if num_processes == 2 else ("toy/transformer",)
    check(errors_on(num_processes, "overlap_cases", models=models), at_least=cases)


@pytest.mark.parametrize(("num_processes", "cases"), [(2, 10), (4, 10)])
def test_parameters_gathered_ahead(num_processes: int, cases: int) -> None:
    models = ("toy/dropout", "gpt2") if num_processes == 2 else ("toy/deep",)
    check(errors_on(num_processes, "prefetch_cases", models=models), at_least=cases)


def test_optimizer_steps_with_clipping_follow_the_serial_ones() -> None:
    check(errors_on(2, "training_cases", models=("toy/transformer", "toy/conv")), at_least=28)
