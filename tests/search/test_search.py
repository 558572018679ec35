"""The search against the oracle that enumerates everything."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.solution import Objective, Pins
from autopar.search.brute import brute_force
from autopar.search.solve import search
from tests.strategies import FakeSource, fake_sources

OBJECTIVES = {
    "time": Objective("time"),
    "energy": Objective("energy"),
    "edp": Objective("edp"),
    "weighted": Objective("weighted", 100.0, 0.7),
}
FEW = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
pins_strategy = st.builds(
    Pins,
    pp=st.sampled_from([None, None, None, 1, 2]),
    recompute=st.sampled_from([None, None, "none", "full"]),
    schedule=st.sampled_from([None, None, "gpipe"]),
)


def check(source: FakeSource, objective: Objective, pins: Pins, *, use_all: bool = False) -> None:
    try:
        oracle = brute_force(source, objective, pins=pins, use_all=use_all)
    except InputError:
        with pytest.raises(InputError):
            search(source, objective, pins=pins, use_all=use_all)
        return
    try:
        found = search(source, objective, pins=pins, use_all=use_all, gap_tolerance=1e-7)
    except (InfeasibleError, InputError):
        assert oracle.decisions is None
        return
    assert oracle.decisions is not None
    assert found.objective_value == pytest.approx(oracle.value, rel=2e-6)
    assert found.bound <= oracle.value * (1 + 1e-9)
    assert found.status == "optimal"
    assert objective.value(found.time_s, found.energy_j) == pytest.approx(found.objective_value, rel=1e-12)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@FEW
@given(source=fake_sources(), pins=pins_strategy, use_all=st.booleans())
def test_search_equals_brute_force(kind: str, source: FakeSource, pins: Pins, use_all: bool) -> None:
    check(source, OBJECTIVES[kind], pins, use_all=use_all)
