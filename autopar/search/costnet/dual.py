"""Lower bounds by sequential tree-reweighted message passing, with multipliers for the liveness rows.

For multipliers l_r >= 0 the Lagrangian adds sum_r l_r u_ip to the costs and -sum_r l_r limit_r to the value. What is
left is a pairwise network, bounded by a sum of chains that run monotonically through the node order: every node lies
on m_i = max(lower, higher neighbours) of them, every edge on one. One sweep visits the nodes upwards, then downwards,
averages the chains at the node and sends messages on:

    total_i[p]  = c_i[p] + sum_k M_ki[p]
    M_ij[q]     = min_p ( total_i[p] / m_i - M_ji[p] + r_ij[p, q] )

After a pass the chains that end at node i hold (m_i - sent_i) / m_i * min total_i, and their sum is the bound, for
whatever multipliers. When the pass is at node i, its total is the sum of the min-marginals of its chains, so that

    bound before + total_i[p] - min total_i  >=  incumbent     =>     strategy p is in no better choice.

V. Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", IEEE TPAMI 28 (2006), gives the
algorithm and the proof that the bound never falls within a sweep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.ir.cost import Array
from autopar.search.costnet.model import Model
from autopar.search.costnet.rows import Integers
from autopar.search.reduce import Network


@dataclass(frozen=True)
class Visit:
    """One node in the sweep.

    Attributes:
        own: flat range of its strategies.
        into: [neighbours, own strategies] flat positions of the messages to it, lower neighbours first.
        share: 1 / number of chains through it.
        lower, higher: what is sent each way; None if nothing.
    """

    own: slice
    into: Integers
    share: float
    lower: Star | None
    higher: Star | None


@dataclass(frozen=True)
class Star:
    """Edges from one node to its neighbours on one side.

    Attributes:
        tables: side by side, [own strategies, sum of the neighbours' strategies].
        members: which rows of `into` come from these neighbours.
        near: the neighbours.
        cuts: where each neighbour's columns begin in `tables`.
        widths: strategies per neighbour.
        out: flat positions of the messages sent, column by column.
    """

    tables: Array
    members: slice
    near: Integers
    cuts: Integers
    widths: Integers
    out: Integers


class Chains:
    """Messages and multipliers of one model. Node k is the k-th existing node, strategies are flat over them.

    Attributes:
        base: costs of the model.
        unary: costs that are bounded, without multipliers; branching adds penalties to `base` here.
        multipliers: one per row.
        bound: of the last pass.
        least: per strategy the best bound seen on choices that use it.
        total: per strategy the total of its node, as of the last pass.
    """

    def __init__(self, model: Model, multipliers: Array | None = None) -> None:
        nodes, network = model.network()
        self.nodes = nodes
        self.sizes = np.array([len(cost) for cost in network.unary], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.unary = np.concatenate([*network.unary, np.zeros(0)])
        self.base = self.unary
        self.constant, self.limits, self.rows = model.constant, model.limits, model.rows
        self.multipliers = np.zeros(len(self.limits)) if multipliers is None else multipliers
        self._lay_terms(model)
        self._lay_edges(network)
        self.messages = np.zeros(self._num_messages)
        self.total = self.unary.copy()
        self.least = np.full(len(self.unary), -np.inf)
        self.bound = -np.inf

    def _lay_terms(self, model: Model) -> None:
        flat = [(k, term) for k, node in enumerate(self.nodes) for term in model.terms[node]]
        self.term_begin = np.array([term.begin for _, term in flat], dtype=np.int64)
        self.term_end = np.array([term.end for _, term in flat], dtype=np.int64)
        self.term_size = np.array([len(term.amount) for _, term in flat], dtype=np.int64)
        self.term_node = np.array([k for k, _ in flat], dtype=np.int64)
        self.amount = np.concatenate([*(term.amount for _, term in flat), np.zeros(0)])
        at = [np.arange(self.first[k], self.first[k + 1]) for k, _ in flat]
        self.amount_at = np.concatenate([*at, np.zeros(0, dtype=np.int64)])

    def _lay_edges(self, network: Network) -> None:
        sizes = self.sizes
        pairs = sorted(network.pairs)
        up: dict[tuple[int, int], int] = {}
        down: dict[tuple[int, int], int] = {}
        lower: list[list[int]] = [[] for _ in sizes]
        higher: list[list[int]] = [[] for _ in sizes]
        position = 0
        for i, j in pairs:
            up[i, j], down[i, j] = position, position + int(sizes[j])
            position = down[i, j] + int(sizes[i])
            lower[j].append(i)
            higher[i].append(j)
        self._num_messages = position
        self.visits: list[Visit] = []
        for k, size in enumerate(sizes.tolist()):
            span = np.arange(size)
            into = [up[i, k] + span for i in lower[k]] + [down[k, j] + span for j in higher[k]]
            count = len(lower[k])
            below = [(network.pairs[i, k].T, down[i, k]) for i in lower[k]]
            above = [(network.pairs[k, j], up[k, j]) for j in higher[k]]
            self.visits.append(
                Visit(
                    slice(int(self.first[k]), int(self.first[k + 1])),
                    np.array(into, dtype=np.int64).reshape(len(into), size),
                    1.0 / max(count, len(above), 1),
                    _star(below, slice(0, count), lower[k]),
                    _star(above, slice(count, None), higher[k]),
                )
            )

    @property
    def num_entries(self) -> int:
        """Entries of all tables."""
        return sum(visit.higher.tables.size for visit in self.visits if visit.higher is not None)

    def costs(self) -> Array:
        """Unary costs with the multipliers' share."""
        if not len(self.amount):
            return self.unary
        return self.unary + self.priced_usage()

    def priced_usage(self) -> Array:
        """Per strategy, its usage at the multipliers' prices."""
        reach = np.concatenate([[0.0], np.cumsum(self.multipliers)])
        price = np.repeat(reach[self.term_end] - reach[self.term_begin], self.term_size)
        return np.asarray(np.bincount(self.amount_at, price * self.amount, len(self.unary)), dtype=np.float64)

    def usage(self, weights: Array) -> Array:
        """[rows]: usage when strategy s is used with weight weights[s]."""
        if not len(self.amount):
            return np.zeros(len(self.limits))
        used = np.add.reduceat(self.amount * weights[self.amount_at], np.cumsum(self.term_size) - self.term_size)
        count = len(self.limits) + 1
        change = np.bincount(self.term_begin, used, count) - np.bincount(self.term_end, used, count)
        return np.asarray(np.cumsum(change)[:-1])

    @property
    def tolerance(self) -> float:
        """How far rounding can put a bound above the truth; generous."""
        largest = float(np.max(np.abs(self.unary), initial=1.0)) + abs(self.constant)
        return 1e-5 + 1e-11 * (largest + float(self.multipliers @ np.abs(self.limits)))

    def reduced(self) -> Array:
        """Per strategy, its total above the least of its node."""
        return np.asarray(self.total - np.repeat(np.minimum.reduceat(self.total, self.first[:-1]), self.sizes))

    def weights(self, temperature: float) -> Array:
        """Per strategy, a share of its node that falls with its reduced total."""
        share = np.exp(-self.reduced() / temperature)
        return np.asarray(share / np.repeat(np.add.reduceat(share, self.first[:-1]), self.sizes))

    def sweep(self) -> float:
        """One pass up and one down; returns the bound."""
        costs = self.costs()
        offset = self.constant - float(self.multipliers @ self.limits)
        before = self._pass(costs, offset, upward=True)
        self.bound = self._pass(costs, offset, upward=False)
        if len(self.total):
            np.maximum(self.least, self.reduced() + before, out=self.least)
        return self.bound

    def _pass(self, costs: Array, offset: float, upward: bool) -> float:
        messages, total = self.messages, self.total
        value = offset
        for node in self.visits if upward else reversed(self.visits):
            into = messages[node.into]
            own = costs[node.own] + into.sum(axis=0)
            total[node.own] = own
            star = node.higher if upward else node.lower
            if star is None:
                value += float(own.min())
                continue
            sent = own * node.share - into[star.members]
            count = len(star.widths)
            if count == 1:
                messages[star.out] = (star.tables + sent.T).min(axis=0)
            else:
                messages[star.out] = (star.tables + np.repeat(sent.T, star.widths, axis=1)).min(axis=0)
            rest = 1.0 - count * node.share
            if rest > 0:
                value += rest * float(own.min())
        return value


def _star(tables: list[tuple[Array, int]], members: slice, near: list[int]) -> Star | None:
    if not tables:
        return None
    widths = np.array([table.shape[1] for table, _ in tables], dtype=np.int64)
    out = np.concatenate([start + np.arange(table.shape[1]) for table, start in tables])
    joined = np.ascontiguousarray(np.concatenate([table for table, _ in tables], axis=1))
    return Star(joined, members, np.array(near), np.cumsum(widths) - widths, widths, out)
