"""Stages with meshes of their own compute the serial step: loss, every gradient, every buffer, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.test_decisions import check, errors_on

pytestmark = pytest.mark.dist
WORK = "uneven_worker:uneven_cases"
TURNED = [[[2, 1], [1, 2]], [[1, 2], [2, 1]]]
WAIST = [[[1, 1], [2, 1], [1, 1]], [[1, 1], [1, 2], [1, 1]]]


def test_stages_that_differ_in_data_and_tensor_degrees_and_in_devices(tmp_path: Path) -> None:
    cases = [["gpt2", TURNED[0]], ["gpt2", TURNED[1]], ["mlp", TURNED[0]], ["toy/deep", WAIST[0]]]
    turned = [["gpt2", TURNED[1]]]
    check(errors_on(4, WORK, cases=cases, training=[], resumed=turned, directory=str(tmp_path)), at_least=5)


@pytest.mark.slow
def test_further_models_and_meshes_on_four_processes() -> None:
    models = ("toy/transformer", "toy/skip", "toy/dropout", "toy/conv", "mlp", "bert", "resnet")
    cases = [[name, meshes] for name in models for meshes in (*TURNED, *WAIST)]
    check(
        errors_on(4, WORK, cases=cases, training=[["gpt2", TURNED[1]], ["toy/conv", TURNED[0]]], resumed=[]),
        at_least=29,
    )


@pytest.mark.slow
def test_stages_of_one_and_of_two_devices_on_three_processes() -> None:
    meshes = ([[2, 1], [1, 1]], [[1, 1], [1, 2]], [[1, 2], [1, 1]])
    cases = [[name, shapes] for name in ("gpt2", "mlp", "toy/deep", "toy/dropout") for shapes in meshes]
    check(errors_on(3, WORK, cases=cases, training=[], resumed=[]), at_least=12)
