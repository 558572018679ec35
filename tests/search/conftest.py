"""Searches of made-up tables do not look for more devices when nothing fits: those tables do not scale."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_more_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.search.relaxations.MOST_GROWTH", 1)
    monkeypatch.setattr("autopar.search.infeasible.MOST_GROWTH", 1)
