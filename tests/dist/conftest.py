"""Ends the processes that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    if (ranks := sys.modules.get("tests.dist.ranks")) is not None:
        ranks.stop_all()
