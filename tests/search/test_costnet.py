"""Cost networks with liveness rows: against brute force, and against published optima where the data exist."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.costnet.dual import Chains
from autopar.search.costnet.instance import FORBIDDEN, Instance, make_instance, read_instance
from autopar.search.costnet.model import make_model
from autopar.search.costnet.shrink import InfeasibleModelError, consistent, settle, shrink
from autopar.search.costnet.solve import solve

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "iopddl"
COSTS = st.one_of(st.integers(0, 40), st.integers(0, 3), st.just(0), st.just(10**18))


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to six nodes of up to four strategies: parallel edges, loops, zero-length lives, forbidden pairs."""
    count = draw(st.integers(1, 6))
    sizes = [draw(st.integers(1, 4)) for _ in range(count)]
    lives = [(a, a + draw(st.integers(0, 4))) for a in (draw(st.integers(0, 6)) for _ in range(count))]
    ends = draw(st.lists(st.tuples(*[st.integers(0, count - 1)] * 2), max_size=9))

    def vector(length: int, values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=length, max_size=length))

    nodes = {
        "intervals": lives,
        "costs": [vector(n, COSTS) for n in sizes],
        "usages": [vector(n, st.integers(0, 9)) for n in sizes],
    }
    edges = {"nodes": ends, "costs": [vector(sizes[i] * sizes[j], COSTS) for i, j in ends]}
    return make_instance({"name": "drawn", "nodes": nodes, "edges": edges, "usage_limit": draw(st.integers(3, 30))})


def optimum(instance: Instance) -> int | None:
    """Least cost over all choices, None if none is feasible."""
    costs = [
        cost
        for choice in itertools.product(*(range(n) for n in np.diff(instance.first)))
        for cost, excess in [instance.evaluate(choice)]
        if cost is not None and excess == 0
    ]
    return min(costs, default=None)


@settings(max_examples=150, deadline=None)
@given(instances())
def test_answer_is_brute_force(instance: Instance) -> None:
    best = optimum(instance)
    outcome = solve(instance, time_limit_s=20.0)
    assert outcome.objective == best
    assert outcome.status == ("infeasible" if best is None else "optimal")
    if best is None:
        return
    assert outcome.choice is not None
    assert instance.evaluate(outcome.choice) == (best, 0)
    assert outcome.bound == best


@settings(max_examples=300, deadline=None)
@given(instances())
def test_preprocessing_keeps_an_optimum(instance: Instance) -> None:
    best = optimum(instance)
    model = make_model(instance)
    try:
        shrink(model)
    except InfeasibleModelError:
        assert best is None
        return
    nodes, network = model.network()
    found = [
        (model.constant + network.value(local), local)
        for local in itertools.product(*(range(len(model.unary[node])) for node in nodes))
        if math.isfinite(network.value(local))
    ]
    values = []
    for value, local in found:
        cost, excess = instance.evaluate(model.expand(nodes, local, instance.num_nodes))
        assert cost == value
        if excess == 0:
            values.append(value)
    assert min(values, default=None) == best


@settings(max_examples=60, deadline=None)
@given(instances())
def test_a_stopped_search_keeps_a_valid_bound(instance: Instance) -> None:
    best = optimum(instance)
    outcome = solve(instance, time_limit_s=0.0)
    assert best is None or outcome.bound <= best
    assert outcome.objective is None or (best is not None and outcome.objective >= best)


@settings(max_examples=100, deadline=None)
@given(instances(), st.lists(st.integers(0, 20), min_size=7, max_size=7))
def test_chain_bounds_hold_for_any_multipliers(instance: Instance, prices: list[int]) -> None:
    """Of the optimum, and per strategy of the cheapest choice that uses it."""
    model = make_model(instance)
    try:
        settle(model)
        consistent(model)
    except InfeasibleModelError:
        assert optimum(instance) is None
        return
    chains = Chains(model, np.array([float(prices[row]) for row in model.rows]))
    bounds = [chains.sweep() for _ in range(5)]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(bounds))
    for choice in itertools.product(*(range(n) for n in np.diff(instance.first))):
        cost, excess = instance.evaluate(choice)
        if cost is None or excess > 0:
            continue
        assert cost >= chains.bound - 1e-6
        for node, p in enumerate(choice):
            at = int(np.searchsorted(model.keep[node], p))
            assert model.keep[node][at] == p  # only infeasible strategies were deleted
            assert cost >= chains.least[chains.first[node] + at] - 1e-6


@settings(max_examples=20, deadline=None)
@given(instances())
def test_same_answer_twice(instance: Instance) -> None:
    first, second = solve(instance), solve(instance)
    assert (first.status, first.objective, first.bound) == (second.status, second.objective, second.bound)
    assert np.array_equal(first.choice, second.choice) if first.choice is not None else second.choice is None


@pytest.mark.parametrize(("name", "value"), [("B", 532_843), ("G", 217_039)])
def test_published_optima_are_proven(name: str, value: int) -> None:
    path = DATA / f"asplos-2025-iopddl-{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    outcome = solve(read_instance(path))
    assert (outcome.status, outcome.objective, outcome.bound) == ("optimal", value, value)


@pytest.mark.slow
def test_hard_instance_gets_close_with_a_bound() -> None:
    """V's optimum is 1,617,084 (published); 0.2 % above is allowed within three minutes."""
    path = DATA / "asplos-2025-iopddl-V.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    outcome = solve(read_instance(path), time_limit_s=170.0)
    assert outcome.objective is not None
    assert outcome.bound <= 1_617_084 <= outcome.objective <= 1_617_084 * 1.002


def test_usage_of_a_node_without_a_choice_counts() -> None:
    """Node 0's only legal strategy takes the whole limit, so node 1 must pay for using nothing."""
    nodes = {"intervals": [[0, 1], [0, 1]], "costs": [[10**18, 0], [0, 1]], "usages": [[0, 3], [1, 0]]}
    problem = {"nodes": nodes, "edges": {"nodes": [], "costs": []}, "usage_limit": 3}
    outcome = solve(make_instance(problem))
    assert (outcome.status, outcome.objective) == ("optimal", 1)


def test_forbidden_is_below_what_the_format_writes() -> None:
    assert FORBIDDEN <= 10**18
