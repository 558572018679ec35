"""Energy and power of the optimum of random small models: what a tighter limit or dearer waiting must do.

That the ends of the frontier are the single plans is tested in `test_frontier`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.solution import Limits, Objective, Pins, Solution
from autopar.search.clocks import ClockOption, ClockPlanner, ClockProblem, pipeline_graph
from autopar.search.solve import search
from tests.strategies import FakeSource, fake_sources

FEW = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SLACK = 2e-6
"""Relative difference between answers that both keep the tolerance."""
TIME, ENERGY = Objective("time"), Objective("energy")


def best(source: FakeSource, objective: Objective, limits: Limits | None = None) -> Solution | None:
    try:
        return search(source, objective, pins=Pins(), limits=limits, gap_tolerance=1e-6)
    except (InfeasibleError, InputError):
        return None


def time_s(found: Solution | None) -> float:
    return math.inf if found is None else found.time_s


def energy_j(found: Solution | None) -> float:
    return math.inf if found is None else found.energy_j


def ends(source: FakeSource) -> tuple[Solution, Solution]:
    """The fastest plan and the thriftiest."""
    fastest, thriftiest = best(source, TIME), best(source, ENERGY)
    assume(fastest is not None and thriftiest is not None)
    assert fastest is not None
    assert thriftiest is not None
    return fastest, thriftiest


shares = st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)).map(sorted)
clocked = st.builds(lambda source, clocks: replace(source, num_clocks=clocks), fake_sources(), st.sampled_from([1, 2]))


@FEW
@given(source=clocked, shares=shares)
def test_a_tighter_deadline_never_lowers_energy(source: FakeSource, shares: list[float]) -> None:
    fastest, thriftiest = ends(source)
    span_s = thriftiest.time_s - fastest.time_s
    tight, loose = (
        best(source, ENERGY, Limits(deadline_s=(fastest.time_s + share * span_s) * (1 + 1e-9))) for share in shares
    )
    assert tight is not None
    assert loose is not None
    assert loose.energy_j <= tight.energy_j * (1 + SLACK)
    assert thriftiest.energy_j <= loose.energy_j * (1 + SLACK)
    assert tight.energy_j <= fastest.energy_j * (1 + SLACK)


@FEW
@given(source=clocked, shares=shares, name=st.sampled_from(["average_power_w", "peak_power_w"]))
def test_a_lower_power_cap_never_lowers_time(source: FakeSource, shares: list[float], name: str) -> None:
    fastest, thriftiest = ends(source)
    most_w = 2 * max(found.energy_j / found.time_s for found in (fastest, thriftiest))
    tight, loose = (best(source, TIME, Limits(**{name: max(share, 0.01) * most_w})) for share in shares)
    assert time_s(loose) <= time_s(tight) * (1 + SLACK)
    assert fastest.time_s <= time_s(loose) * (1 + SLACK)


@FEW
@given(source=clocked, more=st.tuples(st.floats(0.0, 60.0), st.floats(0.0, 60.0)))
def test_waiting_at_higher_power_never_lowers_energy(source: FakeSource, more: tuple[float, float]) -> None:
    device = source.device
    dearer = replace(device, blocked_w=device.blocked_w + more[0], host_w_per_node=device.host_w_per_node + more[1])
    least, other = best(source, ENERGY), best(replace(source, device=dearer, made={}), ENERGY)
    assert energy_j(least) <= energy_j(other) * (1 + SLACK)
    assert time_s(best(source, TIME)) == pytest.approx(time_s(best(replace(source, device=dearer, made={}), TIME)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_clocks_of_instructions_never_cost_less_where_waiting_costs_more(data: st.DataObject) -> None:
    instructions, arcs = pipeline_graph(2, 3)
    spans = st.tuples(st.floats(0.5, 1.5), st.floats(0.3, 0.9), st.floats(150.0, 300.0))
    options = {}
    for stage in range(2):
        for kind in "FB":
            length_s, share, watts = data.draw(spans)
            rows = [(x, length_s * (share / x + 1 - share)) for x in (1.0, 0.8, 0.6)]
            options[stage, kind] = tuple(ClockOption(1400 * x, t, t * (100 + watts * x**3)) for x, t in rows)
    low, high = sorted(data.draw(st.floats(0.0, 100.0)) for _ in range(2))
    planners = [ClockPlanner(ClockProblem(instructions, arcs, options, watts, (1, 1))) for watts in (low, high)]
    deadline_s = planners[0].fastest_s * data.draw(st.floats(1.0, 1.6))
    cheap, dear = (planner.plan(deadline_s) for planner in planners)
    assert 0 < cheap.bound_j <= dear.bound_j * (1 + 1e-9)
    assert cheap.bound_j <= dear.energy_j * (1 + 1e-9)
