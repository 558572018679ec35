"""The frontier against enumeration: ends, resolution, dominance, limits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError, SolverLimitError
from autopar.ir.solution import Limits, Objective, Pins, Solution
from autopar.search.brute import enumerate_plans
from autopar.search.frontier import FrontierResult, frontier
from autopar.search.solve import search
from tests.strategies import FakeDevice, FakeSource, fake_sources

FEW = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
RESOLUTION, TOLERANCE = 1e-2, 1e-4
SLACK = 2 * TOLERANCE
"""Relative difference between answers that both keep the tolerance."""
LIMIT_NAMES = ["deadline_s", "energy_j", "average_power_w", "peak_power_w"]


def paced_plans(source: FakeSource, limits: Limits) -> list[tuple[float, float]]:
    """(T, E) of every plan that fits and keeps the limits, as paced."""
    memory = source.device.memory_bytes
    plans = (p for p in enumerate_plans(source, pins=Pins()) if p.keeps(memory, limits))
    return [figures for plan in plans if (figures := plan.paced(limits)) is not None]


@st.composite
def limits_of(draw: st.DrawFn, source: FakeSource) -> Limits:
    """No limit, or one or two that lie within the range of the plans' figures."""
    plans = paced_plans(source, Limits())
    assume(plans)
    share = st.floats(0.1, 1.0)
    times, joules = [t for t, _ in plans], [e for _, e in plans]
    powers = [e / t for t, e in plans]
    ranges = {
        "deadline_s": (min(times), max(times)),
        "energy_j": (min(joules), max(joules)),
        "average_power_w": (min(powers), max(powers)),
        "peak_power_w": (min(powers), 2 * max(powers)),
    }
    names = draw(st.lists(st.sampled_from(LIMIT_NAMES), max_size=2, unique=True))
    levels = {name: ranges[name][0] + draw(share) * (ranges[name][1] - ranges[name][0]) for name in sorted(names)}
    return Limits(**levels)


def fine(source: FakeSource, limits: Limits, num_points: int = 10**6) -> FrontierResult:
    return frontier(
        source, pins=Pins(), limits=limits, num_points=num_points, resolution=RESOLUTION, gap_tolerance=TOLERANCE
    )


def keeps(point: Solution, limits: Limits) -> bool:
    figures = {
        "deadline_s": point.time_s,
        "energy_j": point.energy_j,
        "average_power_w": point.energy_j / point.time_s,
    }
    found = {name: getattr(limits, name) for name in figures}
    return all(limit is None or figures[name] <= limit * (1 + 1e-9) for name, limit in found.items())


@FEW
@given(source=fake_sources(), data=st.data())
def test_every_plan_has_a_listed_one_that_serves_as_well(source: FakeSource, data: st.DataObject) -> None:
    """With every layout that can win closed; by default some between the ends are left to their bounds."""
    limits = data.draw(limits_of(source))
    plans = paced_plans(source, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autopar.search.frontier.MOST_LAYOUTS", None)
        try:
            found = fine(source, limits)
        except InfeasibleError:
            assert not plans
            return
    assert found.complete
    figures = [(p.time_s, p.energy_j) for p in found.points]
    for time_s, energy_j in plans:
        assert any(t <= time_s * (1 + RESOLUTION) * (1 + 1e-9) and e <= energy_j * (1 + SLACK) for t, e in figures), (
            time_s,
            energy_j,
            figures,
        )


@FEW
@given(source=fake_sources(), data=st.data())
def test_points_are_plans_within_the_limits_and_none_is_dominated(source: FakeSource, data: st.DataObject) -> None:
    limits = data.draw(limits_of(source))
    plans = paced_plans(source, limits)
    try:
        found = fine(source, limits)
    except InfeasibleError:
        assert not plans
        return
    for faster, slower in itertools.pairwise(found.points):
        assert faster.time_s < slower.time_s
        assert faster.energy_j > slower.energy_j
    for point in found.points:
        assert keeps(point, limits)
        assert any((point.time_s, point.energy_j) == pytest.approx(plan, rel=1e-9) for plan in plans)


@FEW
@given(source=fake_sources(), data=st.data(), num_points=st.sampled_from([1, 2, 3, 6]))
def test_ends_are_the_single_plans_however_many_points(
    source: FakeSource, data: st.DataObject, num_points: int
) -> None:
    limits = data.draw(limits_of(source))
    try:
        found = fine(source, limits, num_points)
    except InfeasibleError:
        for kind in ("time", "energy"):
            with pytest.raises(InfeasibleError):
                search(source, Objective(kind), pins=Pins(), limits=limits)
        return
    fastest, thriftiest = (
        search(source, Objective(kind), pins=Pins(), limits=limits, gap_tolerance=1e-7) for kind in ("time", "energy")
    )
    assert found.points[0].time_s == pytest.approx(fastest.time_s, rel=SLACK)
    assert found.points[-1].energy_j == pytest.approx(thriftiest.energy_j, rel=SLACK)
    assert len(found.points) <= max(num_points, 3)
    everything = fine(source, limits, num_points + 4)
    assert everything.points[0].time_s == pytest.approx(found.points[0].time_s, rel=SLACK)
    assert everything.points[-1].energy_j == pytest.approx(found.points[-1].energy_j, rel=SLACK)


@FEW
@given(source=fake_sources())
def test_each_point_bounds_the_energy_of_plans_as_fast(source: FakeSource) -> None:
    plans = paced_plans(source, Limits())
    try:
        found = fine(source, Limits())
    except InfeasibleError:
        return
    for point in found.points:
        least_j = min(e for t, e in plans if t <= point.time_s * (1 + 1e-9))
        if point.objective.kind == "energy":
            assert point.bound <= least_j * (1 + 1e-9)


def test_an_impossible_frontier_is_refused() -> None:
    source = FakeSource(3, (0, 1, 1, 2), 4, FakeDevice(10**6, 4))
    for asked in ({"num_points": 0}, {"resolution": 0.0}, {"gap_tolerance": 1.5}):
        with pytest.raises(InputError):
            frontier(source, pins=Pins(), **asked)  # type: ignore[arg-type]
    with pytest.raises(SolverLimitError):
        frontier(source, pins=Pins(), time_limit_s=-1.0)
    starved = replace(source, device=replace(source.device, memory_bytes=1), made={})
    with pytest.raises(InfeasibleError):
        frontier(starved, pins=Pins())


def test_a_frontier_cut_short_says_so() -> None:
    source = FakeSource(4, (0,), 4, FakeDevice(20_000, 2))
    whole, short = fine(source, Limits()), fine(source, Limits(), 2)
    assert whole.complete
    assert not short.complete
    assert len(short.points) == 2 < len(whole.points)
    assert [p.time_s for p in short.points] == [whole.points[0].time_s, whole.points[-1].time_s]
