"""Elimination, min-marginals, presolve and the marginal ILP against enumeration of small pairwise networks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.ilp import Row, solve_ilp
from autopar.search.presolve import solve_reduced
from autopar.search.reduce import Network, back_substitute, core_network, make_plan, min_marginals, run_plan

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """2 to 5 nodes of 1 to 4 strategies, random edges, some pairs and strategies forbidden."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = rng.integers(1, 5, draw(st.integers(2, 5)))
    unary = [np.where(rng.random(size) < 0.1, np.inf, rng.random(size)) for size in sizes]
    pairs = {}
    for i, j in itertools.combinations(range(len(sizes)), 2):
        if rng.random() < 0.6:
            shape = (sizes[i], sizes[j])
            pairs[i, j] = np.where(rng.random(shape) < 0.2, np.inf, rng.random(shape))
    return Network(tuple(unary), pairs)


def assignments(network: Network) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(cost)) for cost in network.unary)))


def sizes_of(network: Network) -> tuple[int, ...]:
    return tuple(len(cost) for cost in network.unary)


@QUICK
@given(networks())
def test_elimination_equals_ilp_equals_enumeration(network: Network) -> None:
    best = min(network.value(choice) for choice in assignments(network))
    run = run_plan(make_plan(sizes_of(network), sorted(network.pairs), 10**6), network)
    result, choice = solve_ilp(network)
    if not math.isfinite(best):
        assert run.choice is None
        assert choice is None
        assert result.status == "infeasible"
        return
    assert run.choice is not None
    assert choice is not None
    assert network.value(run.choice) == pytest.approx(best)
    assert network.value(choice) == pytest.approx(best)
    assert run.value == pytest.approx(best)
    assert result.bound <= best + 1e-9


@QUICK
@given(networks())
def test_core_left_by_the_cap_completes_to_the_optimum(network: Network) -> None:
    best = min(network.value(choice) for choice in assignments(network))
    run = run_plan(make_plan(sizes_of(network), sorted(network.pairs), 6, max_scope=2), network)
    if not run.plan.core or not math.isfinite(best) or not math.isfinite(run.value):
        return
    _, core = solve_ilp(core_network(run))
    assert core is not None
    choice = [0] * len(network.unary)
    for node, strategy in zip(run.plan.core, core, strict=True):
        choice[node] = strategy
    assert network.value(back_substitute(run, choice)) == pytest.approx(best)


@QUICK
@given(networks())
def test_min_marginals_equal_enumeration(network: Network) -> None:
    run = run_plan(make_plan(sizes_of(network), sorted(network.pairs), 10**6), network)
    if run.choice is None:
        return
    for node, found in enumerate(min_marginals(run)):
        for p, value in enumerate(found):
            least = min(network.value(c) for c in assignments(network) if c[node] == p)
            assert value == pytest.approx(least)


@QUICK
@given(networks(), st.integers(0, 10**6), st.floats(0.2, 1.5))
def test_presolve_keeps_the_optimum_under_rows(network: Network, seed: int, tightness: float) -> None:
    rng = np.random.default_rng(seed)
    usage = Network(
        tuple(np.round(rng.random(len(c)) * (rng.random() < 0.7), 1) for c in network.unary),
        {pair: np.round(rng.random(t.shape) * (rng.random() < 0.2), 1) for pair, t in network.pairs.items()},
    )
    limit = tightness * len(network.unary) / 2
    feasible = [c for c in assignments(network) if usage.value(c) <= limit + 1e-9]
    best = min((network.value(c) for c in feasible), default=math.inf)
    result, choice = solve_reduced(network, [Row(usage, limit)])
    if not math.isfinite(best):
        assert choice is None
        return
    assert choice is not None
    assert network.value(choice) == pytest.approx(best, abs=1e-7)
    assert usage.value(choice) <= limit + 1e-5
    assert result.bound <= best + 1e-7


def test_ilp_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    solve_ilp(Network((np.array([1.0, 2.0]), np.array([3.0, 1.0])), {(0, 1): np.array([[1.0, 5.0], [0.0, 2.0]])}))
    assert capfd.readouterr().out == ""
