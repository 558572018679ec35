"""The search against the oracle that enumerates everything."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.brute import brute_force
from autopar.search.solve import search
from tests.strategies import FakeSource, fake_sources

OBJECTIVES = {
    "time": Objective("time"),
    "energy": Objective("energy"),
    "edp": Objective("edp"),
    "weighted": Objective("weighted", 100.0, 0.7),
}
FEW = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
    assert objective.value(found.time_s, found.energy_j, found.decisions.num_gpus) == pytest.approx(
        found.objective_value, rel=1e-12
    )


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@FEW
@given(source=fake_sources(), pins=pins_strategy, use_all=st.booleans())
def test_search_equals_brute_force(kind: str, source: FakeSource, pins: Pins, use_all: bool) -> None:
    check(source, OBJECTIVES[kind], pins, use_all=use_all)


EVERY = {
    **OBJECTIVES,
    "cost": Objective("cost", energy_weight=0.3, gpu_second_weight=50.0),
    "carbon": Objective("carbon", energy_weight=0.3, gpu_second_weight=5.0, pue=1.2),
}


@st.composite
def limits_of(draw: st.DrawFn, source: FakeSource) -> Limits:
    """Limits around what the fastest and the thriftiest plan of a source reach, so that they bind or exclude."""
    fast = brute_force(source, EVERY["time"], pins=Pins())
    thrifty = brute_force(source, EVERY["energy"], pins=Pins())
    assume(fast.decisions is not None)
    power_w = thrifty.energy_j / thrifty.time_s
    share = st.floats(0.0, 1.2)
    slack_s, slack_j = max(thrifty.time_s - fast.time_s, 0.05), max(fast.energy_j - thrifty.energy_j, 1.0)
    kinds = draw(st.sets(st.sampled_from(["deadline_s", "energy_j", "average_power_w", "peak_power_w"]), min_size=1))
    levels = {
        "deadline_s": fast.time_s + draw(share) * slack_s,
        "energy_j": thrifty.energy_j + draw(share) * slack_j,
        "average_power_w": power_w * (0.6 + draw(share)),
        "peak_power_w": power_w * (0.7 + 2 * draw(share)),
    }
    return Limits(**{kind: levels[kind] for kind in sorted(kinds)})


@pytest.mark.parametrize("kind", sorted(EVERY))
@FEW
@given(data=st.data(), source=fake_sources())
def test_search_equals_brute_force_under_limits(kind: str, data: st.DataObject, source: FakeSource) -> None:
    """Pacing bends a product, so that its proof (not its value) may stay open under an average power cap."""
    limits = data.draw(limits_of(source))
    oracle = brute_force(source, EVERY[kind], pins=Pins(), limits=limits)
    try:
        found = search(source, EVERY[kind], pins=Pins(), limits=limits, gap_tolerance=1e-7)
    except InfeasibleError:
        assert oracle.decisions is None
        return
    assert oracle.decisions is not None
    assert found.objective_value == pytest.approx(oracle.value, rel=2e-6)
    assert found.bound <= oracle.value * (1 + 1e-9)
    if kind != "edp" or limits.average_power_w is None:
        assert found.status == "optimal"
    value = EVERY[kind].value(found.time_s, found.energy_j, found.decisions.num_gpus)
    assert value == pytest.approx(found.objective_value, rel=1e-9)


@FEW
@given(source=fake_sources(), kind=st.sampled_from(sorted(EVERY)), share=st.floats(0.0, 1.0))
def test_tighter_deadlines_and_caps_never_cost_less(source: FakeSource, kind: str, share: float) -> None:
    free = brute_force(source, EVERY["time"], pins=Pins())
    assume(free.decisions is not None)
    for name, level in (("deadline_s", free.time_s), ("average_power_w", free.energy_j / free.time_s)):
        values = []
        for factor in (1.0 + share, 1.0 + share / 2):
            try:
                limits = Limits(**{name: level * factor})
                values.append(search(source, EVERY[kind], pins=Pins(), limits=limits).objective_value)
            except InfeasibleError:
                values.append(math.inf)
        assert values[0] <= values[1] * (1 + 1e-3)
