"""Contiguous partitions against enumeration of all assignments, and published graphs against their known optima."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.search.partition import PartitionEdge, PartitionNode, PartitionProblem, PartitionResult, partition_graph
from autopar.search.partition.problem import evaluate

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "dnn_partitioning"
OPTIMA = {
    "LayerGraphs/bert24_inference": 17.7899,
    "LayerGraphs/bert24_training": 41.7458,
    "LayerGraphs/resnet50_inference": 33.7747,
    "OperatorGraphs/bert_l-3_inference": 27.9186,
    "OperatorGraphs/bert_l-3_training": 65.3031,
}
"""Largest loads by the exact program of the graphs' authors, in the files' time unit."""


def class_order(problem: PartitionProblem, device: tuple[int, ...]) -> nx.DiGraph:
    """Devices with an arc per forward edge between them, and per mirrored edge of classes without forward nodes."""
    colours = [(-1, v) if n.colour is None else (0, n.colour) for v, n in enumerate(problem.nodes)]
    forward = {colours[v] for v, n in enumerate(problem.nodes) if not n.is_backward}
    graph = nx.DiGraph()
    graph.add_nodes_from(set(device))
    for edge in problem.edges:
        source, target = device[edge.source], device[edge.target]
        has_backward = problem.nodes[edge.source].is_backward
        if not problem.nodes[edge.target].is_backward:
            graph.add_edge(source, target)
        elif has_backward and not {colours[edge.source], colours[edge.target]} <= forward:
            graph.add_edge(target, source)
    graph.remove_edges_from([(d, d) for d in set(device)])
    return graph


def brute_force(problem: PartitionProblem) -> float:
    """Least largest load over all assignments of colours to devices whose devices can be ordered."""
    num_devices = problem.num_accelerators + problem.num_cpus
    colours = [(-1, v) if n.colour is None else (0, n.colour) for v, n in enumerate(problem.nodes)]
    distinct = sorted(set(colours))
    best = math.inf
    for choice in itertools.product(range(num_devices), repeat=len(distinct)):
        of_colour = dict(zip(distinct, choice, strict=True))
        device = tuple(of_colour[c] for c in colours)
        if not nx.is_directed_acyclic_graph(class_order(problem, device)):
            continue
        parts = [
            (d >= problem.num_accelerators, frozenset(v for v in range(len(device)) if device[v] == d))
            for d in range(num_devices)
        ]
        best = min(best, max(share.load_s for share in evaluate(problem, parts)))
    return best


def check(problem: PartitionProblem, result: PartitionResult) -> None:
    """The shares are a partition with the stated loads, and no forward edge points back among them."""
    shares = evaluate(problem, [(s.is_cpu, frozenset(s.nodes)) for s in result.shares])
    assert shares == result.shares
    assert result.load_s == max(s.load_s for s in shares)
    assert result.bound_s <= result.load_s < math.inf
    device = {v: index for index, share in enumerate(shares) for v in share.nodes}
    order = class_order(problem, tuple(device[v] for v in range(len(problem.nodes))))
    assert all(a < b for a, b in order.edges)


@st.composite
def problems(draw: st.DrawFn, *, is_training: bool = False) -> PartitionProblem:
    """Small graphs with ties, free nodes, CPU-only nodes, shared colours, CPUs and sometimes tight memory."""
    count = draw(st.integers(1, 4 if is_training else 6))
    time_s = st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0])
    colour = st.one_of(st.none(), st.integers(0, 3))
    nodes = [
        PartitionNode(
            draw(st.one_of(time_s, time_s, time_s, st.none())),
            3 * draw(time_s),
            draw(st.integers(0, 3)),
            False,
            draw(colour),
        )
        for _ in range(count)
    ]
    pairs = [(u, v) for u in range(count) for v in range(u + 1, count) if draw(st.integers(0, 2)) == 0]
    if is_training:
        for v in range(count):
            nodes.append(PartitionNode(draw(time_s), 3 * draw(time_s), draw(st.integers(0, 3)), True, nodes[v].colour))
            if nodes[v].colour is None:
                nodes[v] = PartitionNode(nodes[v].accelerator_s, nodes[v].cpu_s, nodes[v].size_bytes, False, 10 + v)
                nodes[-1] = PartitionNode(nodes[-1].accelerator_s, nodes[-1].cpu_s, nodes[-1].size_bytes, True, 10 + v)
        if draw(st.booleans()):  # a backward node whose colour has no forward node
            last = nodes[-1]
            nodes[-1] = PartitionNode(last.accelerator_s, last.cpu_s, last.size_bytes, True, 20)
        pairs += [(count + v, count + u) for u, v in pairs] + [(v, count + v) for v in range(count)]
    transfers_s = [draw(st.sampled_from([0.0, 0.25, 1.0, 5.0])) for _ in nodes]
    return PartitionProblem(
        tuple(nodes),
        tuple(PartitionEdge(u, v, transfers_s[u]) for u, v in pairs),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 1)),
        draw(st.sampled_from([math.inf, 6.0, 3.0])),
    )


def compare(problem: PartitionProblem, result: PartitionResult) -> None:
    """The result is the brute-force optimum, or both find the problem infeasible."""
    best = brute_force(problem)
    if math.isinf(best):
        assert result.status == "infeasible"
        assert not result.shares
    else:
        assert result.status == "optimal"
        assert result.load_s == pytest.approx(best, rel=1e-9, abs=1e-12)
        check(problem, result)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_dynamic_program_equals_brute_force(problem: PartitionProblem) -> None:
    compare(problem, partition_graph(problem))


@settings(max_examples=100, deadline=None)
@given(problems(is_training=True))
def test_backward_nodes_follow_their_colour_as_brute_force_says(problem: PartitionProblem) -> None:
    compare(problem, partition_graph(problem))


@settings(max_examples=25, deadline=None)
@given(problems())
def test_cp_sat_agrees_where_ideals_are_too_many(problem: PartitionProblem) -> None:
    best = brute_force(problem)
    result = partition_graph(problem, max_ideals=1)
    if math.isinf(best):
        assert result.status == "infeasible"
    else:
        check(problem, result)
        assert result.load_s == pytest.approx(best, rel=1e-6)
        assert result.bound_s == pytest.approx(best, rel=1e-6)


def chain(
    *times_s: float, num_accelerators: int = 2, num_cpus: int = 0, memory_bytes: float = math.inf
) -> PartitionProblem:
    nodes = tuple(PartitionNode(t, 10 * t, 1.0) for t in times_s)
    edges = tuple(PartitionEdge(v, v + 1, 0.0) for v in range(len(times_s) - 1))
    return PartitionProblem(nodes, edges, num_accelerators, num_cpus, memory_bytes)


def test_memory_moves_the_cut() -> None:
    assert partition_graph(chain(1, 1, 1, 3)).load_s == 3
    assert partition_graph(chain(1, 1, 1, 3, memory_bytes=2)).load_s == 4
    assert partition_graph(chain(1, 1, 1, 3, memory_bytes=1)).status == "infeasible"
    assert partition_graph(chain(1, 1, 1, 3, memory_bytes=1, num_cpus=1)).load_s == 20


def test_a_time_limit_of_nothing_still_says_what_it_knows() -> None:
    result = partition_graph(chain(*range(1, 30), num_accelerators=3), time_limit_s=0.0)
    assert result.status == "no-solution"
    assert result.bound_s == pytest.approx(435 / 3)


@pytest.mark.parametrize(
    "edges", [[(0, 2, 1.0)], [(0, 1, -1.0)], [(0, 1, math.nan)], [(0, 1, 1.0), (0, 1, 2.0)], [(0, 1, 1.0), (1, 0, 1.0)]]
)
def test_malformed_graphs_are_refused(edges: list[tuple[int, int, float]]) -> None:
    nodes = (PartitionNode(1.0, 1.0), PartitionNode(1.0, 1.0))
    with pytest.raises(InputError):
        partition_graph(PartitionProblem(nodes, tuple(PartitionEdge(*e) for e in edges), 1))


@pytest.mark.skipif(not DATA.is_dir(), reason="the dnn-partitioning graphs are not beside the checkout")
@pytest.mark.parametrize("name", OPTIMA)
def test_published_graphs_reach_their_optimum(name: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from dnn_partitioning import read_problem
    finally:
        sys.path.pop(0)
    path = DATA / f"{name}.json"
    assert len(json.loads(path.read_text())["nodes"]) > 0
    problem = read_problem(path)
    result = partition_graph(problem)
    check(problem, result)
    assert result.status == "optimal"
    assert result.load_s == pytest.approx(OPTIMA[name], rel=1e-5)
