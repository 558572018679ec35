"""What a run may add to a plan - clipping, precision, ... - gives the numbers of plain torch on one device."""

from __future__ import annotations

import pytest

from tests.dist.test_decisions import check, errors_on

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_over_shards_is_that_of_torch_on_one_device(limit: float) -> None:
    check(errors_on(2, "coverage_worker:clip_cases", models=("toy/transformer", "toy/skip"), limit=limit), at_least=14)
