"""The working form of a cost network during preprocessing: nodes that still exist, and how to go back.

Nodes keep their numbers of the instance and strategies are renumbered as they go; `keep` maps them back. Costs are
integers held in floats (exact below 2^53), inf forbids. `undo` records what expansion needs, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.costnet.instance import FORBIDDEN, Instance
from autopar.search.costnet.rows import Integers, Term, event_rows
from autopar.search.reduce import Elimination, Network, back_substitute

CHECKS = ("legal", "least", "follow")
"""Checks of tables that `shrink` repeats: arc consistency, reparametrisation, following."""


@dataclass(frozen=True)
class Follow:
    """`node` was merged into `leader`: the leader's strategy (by instance number, ascending) fixes the node's.

    A node that leads itself had a single strategy left.
    """

    node: int
    leader: int
    leader_strategies: Integers
    node_strategies: Integers

    def expand(self, choice: Integers) -> None:
        is_single = self.node == self.leader
        at = 0 if is_single else np.searchsorted(self.leader_strategies, choice[self.leader])
        choice[self.node] = self.node_strategies[at]


@dataclass(frozen=True)
class Eliminated:
    """An elimination over the nodes `nodes` (position k in the run is node nodes[k]), strategies kept per position."""

    nodes: tuple[int, ...]
    keep: tuple[Integers, ...]
    run: Elimination

    def expand(self, choice: Integers) -> None:
        local = [0] * len(self.nodes)
        for k in self.run.plan.core:
            local[k] = int(np.searchsorted(self.keep[k], choice[self.nodes[k]]))
        full = back_substitute(self.run, local)
        for step in self.run.plan.steps:
            choice[self.nodes[step.node]] = self.keep[step.node][full[step.node]]


@dataclass
class Model:
    """Mutable network; see the module docstring.

    Attributes:
        unary: per instance node its costs; empty where the node is gone.
        tables: cost of node pairs i < j, shape [strategies of i, strategies of j].
        near: neighbours of each node.
        keep: per node, instance numbers of its strategies, ascending.
        terms, limits: liveness rows.
        rows: number of each row at the start.
        constant: cost that every choice pays.
        alive: nodes that exist.
        undo: expansion records.
        stale: per kind of check, pairs whose tables changed since (see `take_stale`).
        dirty: nodes whose costs or neighbourhood changed since dominance last saw them.
    """

    unary: list[Array]
    tables: dict[tuple[int, int], Array]
    near: list[set[int]]
    keep: list[Integers]
    terms: list[list[Term]]
    limits: Array
    rows: Integers
    alive: NDArray[np.bool_]
    constant: float = 0.0
    undo: list[Follow | Eliminated] = field(default_factory=list)
    stale: dict[str, set[tuple[int, int]]] = field(default_factory=lambda: {check: set() for check in CHECKS})
    dirty: set[int] = field(default_factory=set)

    @property
    def nodes(self) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.alive)]

    def size(self) -> tuple[int, int, int, int]:
        """Nodes, strategies, finite pairs, rows."""
        nodes = self.nodes
        pairs = sum(int(np.isfinite(table).sum()) for table in self.tables.values())
        return len(nodes), sum(len(self.unary[i]) for i in nodes), pairs, len(self.limits)

    def table(self, i: int, j: int) -> Array:
        """Table with i's strategies first."""
        return self.tables[i, j] if i < j else self.tables[j, i].T

    def _touch(self, pair: tuple[int, int]) -> None:
        for pairs in self.stale.values():
            pairs.add(pair)

    def take_stale(self, check: str) -> list[tuple[int, int]]:
        """Pairs whose tables changed since the last call for this check, which is taken to do them now."""
        pairs = sorted(self.stale[check])
        self.stale[check].clear()
        return pairs

    def replace_table(self, i: int, j: int, table: Array) -> None:
        """Another table for a pair i < j."""
        self.tables[i, j] = table
        self._touch((i, j))
        self.dirty |= {i, j}

    def add_table(self, i: int, j: int, table: Array) -> None:
        """Add [strategies of i, strategies of j] to the pair's costs."""
        if i > j:
            i, j, table = j, i, np.ascontiguousarray(table.T)
        self.tables[i, j] = self.tables[i, j] + table if (i, j) in self.tables else table
        self._touch((i, j))
        self.near[i].add(j)
        self.near[j].add(i)
        self.dirty |= {i, j}

    def drop_table(self, i: int, j: int) -> None:
        pair = (min(i, j), max(i, j))
        del self.tables[pair]
        for pairs in self.stale.values():
            pairs.discard(pair)
        self.near[i].discard(j)
        self.near[j].discard(i)
        self.dirty |= {i, j}

    def restrict(self, node: int, index: Integers) -> None:
        """Keep only the strategies `index` (ascending) of a node."""
        self.unary[node] = self.unary[node][index]
        self.keep[node] = self.keep[node][index]
        self.terms[node] = [Term(t.begin, t.end, t.amount[index]) for t in self.terms[node]]
        self.dirty.add(node)
        self.dirty |= self.near[node]
        for other in self.near[node]:
            pair = (min(node, other), max(node, other))
            table = self.tables[pair]
            self._touch(pair)
            self.tables[pair] = np.ascontiguousarray(table[index] if node < other else table[:, index])

    def local(self, nodes: Sequence[int], choice: Integers) -> Integers | None:
        """An instance's choice in the numbering of now, None if some strategy is gone."""
        found = [int(np.searchsorted(self.keep[node], choice[node])) for node in nodes]
        is_there = [p < len(self.keep[n]) and self.keep[n][p] == choice[n] for n, p in zip(nodes, found, strict=True)]
        return np.array(found, dtype=np.int64) if all(is_there) else None

    def remove(self, node: int) -> None:
        """A node without tables leaves."""
        self.alive[node] = False
        self.unary[node] = np.zeros(0)
        self.terms[node] = []
        self.dirty.discard(node)

    def network(self) -> tuple[tuple[int, ...], Network]:
        """The nodes, and the network over them renumbered in order."""
        nodes = self.nodes
        position = {node: k for k, node in enumerate(nodes)}
        pairs = {(position[i], position[j]): table for (i, j), table in self.tables.items()}
        return tuple(nodes), Network(tuple(self.unary[i] for i in nodes), pairs)

    def expand(self, nodes: Sequence[int], local: Sequence[int], num_nodes: int) -> Integers:
        """Instance choice from strategies `local` (as numbered now) of the existing nodes."""
        choice = np.zeros(num_nodes, dtype=np.int64)
        for node, p in zip(nodes, local, strict=True):
            choice[node] = self.keep[node][p]
        for record in reversed(self.undo):
            record.expand(choice)
        return choice


def make_model(instance: Instance) -> Model:
    """The unreduced model: parallel edges added up, edges within one node folded into its costs."""
    bounds = itertools.pairwise(instance.first.tolist())
    cost = np.where(instance.cost >= FORBIDDEN, np.inf, instance.cost.astype(np.float64))
    usage = instance.usage.astype(np.float64)
    pair_cost = np.where(instance.pair_cost >= FORBIDDEN, np.inf, instance.pair_cost.astype(np.float64))
    begin, end = event_rows(instance.start, instance.stop)
    unary, terms = [], []
    for node, (a, b) in enumerate(bounds):
        unary.append(cost[a:b])
        is_used = begin[node] < end[node]
        terms.append([Term(int(begin[node]), int(end[node]), usage[a:b])] if is_used else [])
    num_rows = int(end.max(initial=0))
    model = Model(
        unary,
        {},
        [set() for _ in unary],
        [np.arange(len(c)) for c in unary],
        terms,
        np.full(num_rows, float(instance.limit)),
        np.arange(num_rows),
        np.ones(len(unary), dtype=bool),
        dirty=set(range(len(unary))),
    )
    edges = zip(
        instance.ends.tolist(), instance.first_pair[:-1].tolist(), instance.first_pair[1:].tolist(), strict=True
    )
    for (i, j), a, b in edges:
        table = pair_cost[a:b].reshape(len(unary[i]), len(unary[j]))
        if i == j:
            unary[i] = unary[i] + np.diagonal(table)
        else:
            model.add_table(i, j, table)
    return model
