"""Stages with meshes of their own compute the serial step: loss, every gradient, every buffer, in float64."""

from __future__ import annotations

import pytest

from tests.dist.test_decisions import check, errors_on

pytestmark = pytest.mark.dist
WORK = "uneven_worker:uneven_cases"


def test_data_parallel_stages_before_tensor_parallel_ones_and_after() -> None:
    meshes = [[[2, 1], [1, 2]], [[1, 2], [2, 1]]]
    check(errors_on(4, WORK, models=("toy/transformer", "toy/skip", "mlp"), meshes=meshes), at_least=6)


def test_stages_of_one_and_of_two_devices() -> None:
    meshes = [[[2, 1], [1, 1]], [[1, 1], [1, 2]], [[1, 2], [1, 1]]]
    check(errors_on(3, WORK, models=("toy/deep", "toy/dropout"), meshes=meshes), at_least=6)


def test_three_stages_of_which_the_middle_one_is_wider() -> None:
    check(errors_on(4, WORK, models=("toy/deep", "toy/transformer"), meshes=[[[1, 1], [2, 1], [1, 1]]]), at_least=2)


def test_optimizer_steps_with_clipping_follow_the_serial_ones() -> None:
    work = "uneven_worker:uneven_training"
    check(errors_on(4, work, models=("toy/transformer",), meshes=[[[2, 1], [1, 2]], [[1, 2], [2, 1]]]), at_least=2)
