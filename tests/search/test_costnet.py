"""Cost networks with liveness rows: against brute force, and against published optima where the data exist."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.costnet.instance import FORBIDDEN, Instance, make_instance, read_instance
from autopar.search.costnet.model import make_model
from autopar.search.costnet.shrink import InfeasibleModelError, shrink
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


@pytest.mark.parametrize(("name", "value"), [("B", 532_843), ("G", 217_039)])
def test_published_optima_are_proven(name: str, value: int) -> None:
    path = DATA / f"asplos-2025-iopddl-{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    outcome = solve(read_instance(path))
    assert (outcome.status, outcome.objective, outcome.bound) == ("optimal", value, value)


def test_usage_of_a_node_without_a_choice_counts() -> None:
    """Node 0's only legal strategy takes the whole limit, so node 1 must pay for using nothing."""
    nodes = {"intervals": [[0, 1], [0, 1]], "costs": [[10**18, 0], [0, 1]], "usages": [[0, 3], [1, 0]]}
    problem = {"nodes": nodes, "edges": {"nodes": [], "costs": []}, "usage_limit": 3}
    outcome = solve(make_instance(problem))
    assert (outcome.status, outcome.objective) == ("optimal", 1)


def test_forbidden_is_below_what_the_format_writes() -> None:
    assert FORBIDDEN <= 10**18
