"""The search on mixed clusters against the oracle that enumerates everything, and what must hold of the space."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError, InputError
from autopar.ir.cost import Link
from autopar.ir.mesh import stage_mesh
from autopar.ir.mixed import MixedSource, arrangements, envelope
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.brute import brute_force
from autopar.search.solve import search
from tests.strategies import FakeDevice, FakeSource, ScaledSource, mixed_sources

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


@FEW
@given(source=mixed_sources(), kind=st.sampled_from(sorted(OBJECTIVES)), slow=st.sampled_from([0.2, 1.0, 3.0]))
def test_one_more_type_never_costs_more(source: MixedSource, kind: str, slow: float) -> None:
    part = source.parts[0]
    assert isinstance(part, ScaledSource)
    every = range(len(source.parts) + 1)
    link = Link(0.01, 2e-5, 3e-4)
    links = {(a, b): source.links.get((a, b), link) for a in every for b in every if a != b}
    more = MixedSource((*source.names, "new"), (*source.parts, replace(part, seed=7, slow=slow)), links)
    assert optimum(more, OBJECTIVES[kind]) <= optimum(source, OBJECTIVES[kind]) * (1 + 1e-6)


@FEW
@given(source=mixed_sources(), times=st.sampled_from([0.5, 2.0]))
def test_a_faster_type_never_costs_more(source: MixedSource, times: float) -> None:
    parts = [part for part in source.parts if isinstance(part, ScaledSource)]
    changed = replace(parts[0], slow=parts[0].slow * times)
    values = [
        optimum(replace(source, parts=(first, *source.parts[1:])), OBJECTIVES["time"]) for first in (parts[0], changed)
    ]
    fast, slow = values if times > 1 else reversed(values)
    assert fast <= slow * (1 + 1e-6)


def test_a_fast_type_gets_more_blocks() -> None:
    """Equal blocks on one device of each type, one three times as fast: three of four blocks go there."""
    base = FakeSource(4, (0, 0, 0, 0), 4, FakeDevice(1, 1), forbid=0.0)
    parts = tuple(ScaledSource(base, FakeDevice(10**6, 1), 1, slow, 1.0) for slow in (3.0, 1.0))
    link = Link(0.0, 0.0, 0.0)
    source = MixedSource(("slow", "fast"), parts, {(0, 1): link, (1, 0): link})
    stages = search(source, OBJECTIVES["time"], pins=Pins(pp=2, num_microbatches=4)).decisions.stages
    assert {stage.gpu: stage.stop - stage.start for stage in stages} == {"slow": 1, "fast": 3}


def test_arrangements_keep_types_together_and_within_their_room() -> None:
    for num_stages, room in itertools.product(range(1, 6), [(2,), (3, 1), (5, 2, 0), (1, 2, 3)]):
        expected = set()
        for kinds in itertools.product(range(len(room)), repeat=num_stages):
            runs = [kind for kind, _ in itertools.groupby(kinds)]
            if len(runs) == len(set(runs)) and all(kinds.count(kind) <= room[kind] for kind in runs):
                expected.add(kinds)
        found = arrangements(num_stages, room)
        assert set(found) == expected
        assert len(found) == len(expected)


def test_tables_of_other_structure_are_refused() -> None:
    one, other = (FakeSource(seed, (0, 1), 2, FakeDevice(1, 1)).table(stage_mesh(1), 1) for seed in (1, 3))
    assert one is not None
    assert other is not None
    assert [len(node.choices) for node in one.nodes] != [len(node.choices) for node in other.nodes]
    with pytest.raises(ValueError, match="more than figures"):
        envelope((one, other), ())


def test_what_mixed_clusters_cannot_is_said() -> None:
    base = FakeSource(4, (0, 1), 4, FakeDevice(1, 1))
    parts = tuple(ScaledSource(base, FakeDevice(memory, 1), 1, 1.0, 1.0) for memory in (1, 2))
    link = Link(0.01, 2e-5, 3e-4)
    source = MixedSource(("a", "b"), parts, {(0, 1): link, (1, 0): link})
    with pytest.raises(InputError, match="peak power"):
        search(source, OBJECTIVES["time"], pins=Pins(), limits=Limits(peak_power_w=5.0))
    with pytest.raises(InfeasibleError, match="1 B, 2 B usable"):
        search(source, OBJECTIVES["time"], pins=Pins())
    roomy = replace(source, parts=tuple(replace(part, device=FakeDevice(10**6, 1)) for part in parts))
    with pytest.raises(InfeasibleError) as caught:
        search(roomy, OBJECTIVES["energy"], pins=Pins(), limits=Limits(deadline_s=1e-6))
    least = caught.value.remedies[0].value
    assert least == pytest.approx(optimum(roomy, OBJECTIVES["time"]), rel=2e-3)
