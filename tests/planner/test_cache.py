"""The plan cache: a hit spares the search, anything that affects the plan changes the key, damage is no obstacle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cost.hardware import load_cluster
from autopar.ir.plan import ModelReference
from autopar.ir.solution import Objective, Pins
from autopar.planner import cache
from autopar.planner.cache import cache_key, cached_plan
from autopar.planner.detect import GpuChoice
from autopar.planner.profile import LoadedProfile
from autopar.planner.request import PlanRequest, Target
from tests.planner.plans import tiny_graph, tiny_plan

REFERENCE = ModelReference("tiny.py", {}, "", 0)
REQUEST = PlanRequest(2, gpu="l4")


def _target(gpu: str = "l4", digest: str = "") -> Target:
    return Target(GpuChoice(gpu, "flag", 0, ""), load_cluster(gpu, 2), LoadedProfile(None, digest, ""))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path / "deep" / "cache"))


def test_a_hit_spares_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def search(*_: object) -> object:
        calls.append(1)
        return tiny_plan()

    monkeypatch.setattr(cache, "plan_graph", search)
    assert cached_plan(tiny_graph(), REFERENCE, REQUEST, _target()) == tiny_plan()
    assert cached_plan(tiny_graph(), REFERENCE, REQUEST, _target()) == tiny_plan()
    assert len(calls) == 1
    next(cache.cache_directory().glob("*.json")).write_text("damaged")
    assert cached_plan(tiny_graph(), REFERENCE, REQUEST, _target()) == tiny_plan()
    assert len(calls) == 2


def test_everything_that_affects_the_plan_changes_the_key() -> None:
    requests = [
        REQUEST,
        replace(REQUEST, objective=Objective("energy")),
        replace(REQUEST, pins=Pins(pp=2)),
        replace(REQUEST, use_all=True),
        replace(REQUEST, gap_tolerance=0.1),
    ]
    keys = [cache_key(tiny_graph(), REFERENCE, request, _target()) for request in requests]
    keys.append(cache_key(tiny_graph(16), REFERENCE, REQUEST, _target()))
    keys.append(cache_key(tiny_graph(), replace(REFERENCE, options={"a": "b"}), REQUEST, _target()))
    keys += [cache_key(tiny_graph(), REFERENCE, REQUEST, target) for target in (_target("k20"), _target(digest="x"))]
    assert len(set(keys)) == len(keys)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache, "plan_graph", lambda *_: tiny_plan())
    assert cached_plan(tiny_graph(), REFERENCE, REQUEST, _target()) == tiny_plan()
