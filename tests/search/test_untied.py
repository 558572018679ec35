"""Blocks that choose for themselves: the bound of the untied problem against enumeration of its tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from autopar.errors import InfeasibleError
from autopar.ir.mesh import stage_mesh
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.brute import brute_force, layouts
from autopar.search.evaluate import evaluate
from autopar.search.solve import SEARCH_SHARE, make_space, search, useful_clocks
from autopar.search.space import list_skeletons
from autopar.search.stages import Question
from autopar.search.untied import UntiedSource, untie, untied_bound, untied_table
from tests.strategies import FakeDevice, FakeSource, fake_sources

FEW = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MOST_COMBINATIONS = 120
KINDS = ["time", "energy", "edp"]


def combinations(source: FakeSource) -> int:
    """Choices of the largest untied table."""
    table = source.table(stage_mesh(1), 1)
    assert table is not None
    return math.prod(len(node.choices) for node in untied_table(table).nodes)


@st.composite
def small_sources(draw: st.DrawFn) -> FakeSource:
    """Chains with at least two equal blocks whose untied problem can be enumerated."""
    source = draw(fake_sources(memory=(3_000, 20_000)))
    device = replace(source.device, num_gpus=min(source.device.num_gpus, 2))
    source = replace(source, device=device, batch_size=min(source.batch_size, 2), num_clocks=min(source.num_clocks, 2))
    assume(len(set(source.classes)) < len(source.classes))
    for seed in range(source.seed, source.seed + 20):
        trial = replace(source, seed=seed, made={})
        if 2 <= combinations(trial) <= MOST_COMBINATIONS:
            return trial
    assume(False)
    raise AssertionError


def answered(source: FakeSource, kind: str, limits: Limits, tolerance: float = 1e-7) -> Question:
    objective, pins = Objective(kind), Pins()
    clocks = useful_clocks(source, objective, limits)
    skeletons = list_skeletons(source, pins, use_all=False, max_microbatches=None, clocks=clocks)
    question = Question(make_space(source, skeletons, pins, limits, tolerance * SEARCH_SHARE), objective, limits)
    question.run()
    return question


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(source=small_sources(), slack=st.sampled_from([None, 1.0, 1.2]))
def test_bound_is_below_the_untied_optimum_below_the_tied_one(
    kind: str, source: FakeSource, slack: float | None
) -> None:
    free = brute_force(source, Objective("time"), pins=Pins())
    limits = Limits(deadline_s=free.time_s * slack) if slack and free.decisions else Limits()
    tied = brute_force(source, Objective(kind), pins=Pins(), limits=limits)
    oracle = brute_force(UntiedSource(source), Objective(kind), pins=Pins(), limits=limits)
    assert oracle.value <= tied.value * (1 + 1e-9)
    question = answered(source, kind, limits)
    if tied.decisions is None:
        assert question.plan is None
        return
    assert untied_bound(question.space, question) <= oracle.value * (1 + 1e-9)
    closed = untie(question.space, question, None)
    assert closed.bound <= oracle.value * (1 + 1e-9)
    assert closed.value == pytest.approx(oracle.value, rel=2e-6)
    assert closed.bound == pytest.approx(oracle.value, rel=2e-6)


@FEW
@given(source=fake_sources(), kind=st.sampled_from(KINDS))
def test_blocks_that_are_all_different_have_nothing_to_untie(source: FakeSource, kind: str) -> None:
    source = replace(source, classes=tuple(range(len(source.classes))), made={})
    for mesh in (stage_mesh(1), stage_mesh(2)):
        table = source.table(mesh, 1)
        assert table is not None
        assert untied_table(table) == table
    question = answered(source, kind, Limits())
    if question.plan is not None:
        found = untie(question.space, question, None)
        assert (found.value, found.bound) == pytest.approx((question.value, question.value), rel=2e-6)


@FEW
@given(source=fake_sources(), data=st.data())
def test_a_tied_choice_costs_the_same_untied(source: FakeSource, data: st.DataObject) -> None:
    clock = data.draw(st.integers(0, source.num_clocks - 1))
    table, figures = source.table(stage_mesh(1), 1), source.clock_figures(stage_mesh(1), 1)
    free = UntiedSource(source)
    untied, stacked = free.table(stage_mesh(1), 1), free.clock_figures(stage_mesh(1), 1)
    assert table is not None
    assert figures is not None
    assert untied is not None
    assert stacked is not None
    table, untied = figures.at(table, clock), stacked.at(untied, clock)
    choice = [data.draw(st.integers(0, len(node.choices) - 1)) for node in table.nodes]
    assume(all(np.isfinite(e.forward_s[choice[e.source], choice[e.target]]) for e in table.edges))
    by_name = {name: p for node, p in zip(table.nodes, choice, strict=True) for name in node.names}
    copies = [by_name[node.names[0]] for node in untied.nodes]
    for layout in layouts(table.num_blocks, min(2, table.num_blocks), None, "1f1b"):
        tied, apart = (evaluate(t, source.device, layout, c) for t, c in ((table, choice), (untied, copies)))
        assert (apart.time_s, apart.energy_j) == pytest.approx((tied.time_s, tied.energy_j))
        assert apart.memory_bytes == pytest.approx(tied.memory_bytes)


def test_every_block_has_nodes_of_its_own() -> None:
    table = FakeSource(3, (0, 1, 1, 2), 4, FakeDevice(10**6, 4), with_parameter=True, with_shared=True).table(
        stage_mesh(2), 2
    )
    assert table is not None
    untied = untied_table(table)
    assert all(len(set(node.blocks)) == 1 for node in untied.nodes)
    assert sorted(n for node in untied.nodes for n in node.names) == sorted(n for x in table.nodes for n in x.names)
    for edge in untied.edges:
        (pair,) = set(edge.cut_pairs)
        assert (untied.nodes[edge.source].blocks[0], untied.nodes[edge.target].blocks[0]) == pair
    for crossing in untied.crossings:
        assert untied.nodes[crossing.node].blocks == (crossing.producer_block,)


@FEW
@given(source=fake_sources(memory=(3_000, 12_000)), kind=st.sampled_from(KINDS))
def test_search_tells_what_tying_may_lose_only_when_asked(source: FakeSource, kind: str) -> None:
    try:
        plain = search(source, Objective(kind), pins=Pins())
    except InfeasibleError:
        return
    asked = search(source, Objective(kind), pins=Pins(), untied=True)
    assert "tying" not in plain.gap_parts
    assert asked.gap_parts["tying"] >= 0
    gap_parts = {name: part for name, part in asked.gap_parts.items() if name != "tying"}
    assert replace(asked, wall_s=0.0, gap_parts=gap_parts) == replace(plain, wall_s=0.0)
    question = answered(source, kind, Limits(), 1e-3)
    bound = plain.bound - asked.gap_parts["tying"] * plain.objective_value
    assert bound == pytest.approx(min(plain.bound, untied_bound(question.space, question)), rel=1e-9, abs=1e-12)
