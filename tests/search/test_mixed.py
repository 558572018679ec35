"""The search on mixed clusters against the oracle that enumerates everything, and what must hold of the space."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.mixed import MixedSource
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.brute import brute_force
from autopar.search.solve import search
from tests.strategies import mixed_sources

OBJECTIVES = {
    "time": Objective("time"),
    "energy": Objective("energy"),
    "edp": Objective("edp"),
    "weighted": Objective("weighted", 100.0, 0.7),
}
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def optimum(source: MixedSource, objective: Objective, limits: Limits | None = None) -> float:
    try:
        return search(source, objective, pins=Pins(), limits=limits, gap_tolerance=1e-7).objective_value
    except (InfeasibleError, InputError):
        return math.inf


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@FEW
@given(source=mixed_sources(), use_all=st.booleans(), slack=st.sampled_from([None, None, 0.9, 1.05, 1.3]))
def test_search_equals_brute_force(kind: str, source: MixedSource, use_all: bool, slack: float | None) -> None:
    objective, limits = OBJECTIVES[kind], Limits()
    try:
        fastest = brute_force(source, OBJECTIVES["time"], pins=Pins(), use_all=use_all)
    except InputError:
        with pytest.raises(InputError):
            search(source, objective, pins=Pins(), use_all=use_all)
        return
    if slack is not None and fastest.decisions is not None:
        limits = Limits(deadline_s=slack * fastest.time_s)
    oracle = brute_force(source, objective, pins=Pins(), limits=limits, use_all=use_all)
    try:
        found = search(source, objective, pins=Pins(), limits=limits, use_all=use_all, gap_tolerance=1e-7)
    except (InfeasibleError, InputError):
        assert oracle.decisions is None
        return
    assert oracle.decisions is not None
    assert found.objective_value == pytest.approx(oracle.value, rel=2e-6)
    assert found.bound <= oracle.value * (1 + 1e-9)
    assert found.status == "optimal"
    assert {stage.gpu for stage in found.decisions.stages} <= set(source.names)
