"""Contraction: one unit per colour class, cycles among classes merged, free leaves merged into their neighbour.

All steps keep an optimum. A class without forward nodes gets an empty forward part, tied to its neighbours by the
mirror image of the backward edges. Classes on a cycle of forward edges cannot be separated by contiguous devices. A
leaf that takes no time (and no memory, where memory can bind) costs nothing on the device of its only neighbour, and
there it cuts no further producer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import networkx as nx

from autopar.errors import InputError
from autopar.search.partition.problem import PartitionProblem


@dataclass(frozen=True)
class Unit:
    """Nodes that stay together. `accelerator_s` is None if any of them needs a CPU."""

    nodes: tuple[int, ...]
    accelerator_s: float | None
    cpu_s: float
    size_bytes: float


@dataclass(frozen=True)
class Contracted:
    """Units in a topological order; `predecessors[i]`: units before i; `nets`: (units of one producer, transfer time).

    A net costs its time to every accelerator that holds some but not all of its units.
    """

    units: tuple[Unit, ...]
    predecessors: tuple[tuple[int, ...], ...]
    nets: tuple[tuple[tuple[int, ...], float], ...]


def contract(problem: PartitionProblem) -> Contracted:
    """Merge what no optimal contiguous partition needs to separate.

    Raises:
        InputError: if the graph has a cycle.
    """
    graph = nx.DiGraph((e.source, e.target) for e in problem.edges)
    if not nx.is_directed_acyclic_graph(graph):
        raise InputError("the graph has a cycle")
    group = _colour_groups(problem)
    group = _merge_cycles(problem, group)
    while (merged := _merge_free_leaves(problem, group)) != group:
        group = merged
    return _numbered(problem, group)


def _colour_groups(problem: PartitionProblem) -> list[int]:
    """Node -> least node of its colour."""
    first: dict[int, int] = {}
    return [v if n.colour is None else first.setdefault(n.colour, v) for v, n in enumerate(problem.nodes)]


def _order_edges(problem: PartitionProblem, group: list[int]) -> set[tuple[int, int]]:
    """Edges between groups that a contiguous partition respects."""
    has_forward = {group[v] for v, node in enumerate(problem.nodes) if not node.is_backward}
    edges = set()
    for edge in problem.edges:
        source, target = group[edge.source], group[edge.target]
        if source == target:
            continue
        if not problem.nodes[edge.target].is_backward:
            edges.add((source, target))
        elif problem.nodes[edge.source].is_backward and not (source in has_forward and target in has_forward):
            edges.add((target, source))
    return edges


def _order_graph(problem: PartitionProblem, group: list[int]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(sorted(set(group)))
    graph.add_edges_from(sorted(_order_edges(problem, group)))
    return graph


def _merge_cycles(problem: PartitionProblem, group: list[int]) -> list[int]:
    leader = {}
    for component in nx.strongly_connected_components(_order_graph(problem, group)):
        leader.update(dict.fromkeys(component, min(component)))
    return [leader[g] for g in group]


def _merge_free_leaves(problem: PartitionProblem, group: list[int]) -> list[int]:
    """One round; stars of leaves around one neighbour merge at once."""
    is_memory_loose = sum(node.size_bytes for node in problem.nodes) <= problem.memory_bytes
    free = dict.fromkeys(group, True)
    for v, node in enumerate(problem.nodes):
        is_free = node.accelerator_s == 0 and node.cpu_s == 0 and (is_memory_loose or node.size_bytes == 0)
        free[group[v]] = free[group[v]] and is_free
    graph = _order_graph(problem, group)
    nets_of: dict[int, list[set[int]]] = defaultdict(list)
    for units, _ in _nets(problem, group):
        for unit in units:
            nets_of[unit].append(set(units))
    into: dict[int, int] = {}
    for unit in graph:
        neighbours = sorted({*graph.predecessors(unit), *graph.successors(unit)})
        if free[unit] and len(neighbours) == 1 and neighbours[0] not in into and unit not in into.values():
            neighbour = neighbours[0]
            if all(neighbour in net for net in nets_of[unit]):
                into[unit] = neighbour
    return [into.get(g, g) for g in group]


def _nets(problem: PartitionProblem, group: list[int]) -> list[tuple[tuple[int, ...], float]]:
    """Distinct sets of groups that one producer joins, with the sum of their transfer times; none that cannot cost."""
    joined: dict[int, set[int]] = defaultdict(set)
    for edge in problem.edges:
        joined[edge.source] |= {group[edge.source], group[edge.target]}
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for source, transfer_s in sorted(problem.transfers_s().items()):
        if transfer_s > 0 and len(joined[source]) > 1:
            total[tuple(sorted(joined[source]))] += transfer_s
    return sorted(total.items())


def _numbered(problem: PartitionProblem, group: list[int]) -> Contracted:
    graph = _order_graph(problem, group)
    order = list(nx.lexicographical_topological_sort(graph))
    number = {unit: index for index, unit in enumerate(order)}
    members: dict[int, list[int]] = defaultdict(list)
    for v, unit in enumerate(group):
        members[unit].append(v)
    units = []
    for unit in order:
        nodes = [problem.nodes[v] for v in members[unit]]
        times = [n.accelerator_s for n in nodes if n.accelerator_s is not None]
        accelerator_s = sum(times) if len(times) == len(nodes) else None
        cpu_s, size_bytes = sum(n.cpu_s for n in nodes), sum(n.size_bytes for n in nodes)
        units.append(Unit(tuple(members[unit]), accelerator_s, cpu_s, size_bytes))
    predecessors = tuple(tuple(sorted(number[p] for p in graph.predecessors(unit))) for unit in order)
    nets = tuple((tuple(sorted(number[u] for u in net)), time) for net, time in _nets(problem, group))
    return Contracted(tuple(units), predecessors, nets)
