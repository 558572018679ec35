"""Branch and bound on what is left after preprocessing, best bound first.

A branch forbids strategies of one node by a penalty on their costs, so that messages and multipliers carry over. The
node is the one whose usage, priced by the multipliers, varies most among its near-optimal strategies: it splits at the
mean. Where memory is settled, the node with the most even choice splits into its best strategy and the rest. At each
branch strategies go that no row can bear beside the least usages of the others, and those whose bound reaches the
incumbent.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.costnet.ascent import climb
from autopar.search.costnet.dual import Chains
from autopar.search.costnet.rows import Integers, range_least

Mask = NDArray[np.bool_]

PROPAGATIONS = 5
CHILD_SWEEPS = 20
LEAST_VARIANCE = 1.0


@dataclass(order=True)
class _Open:
    bound: float
    number: int
    banned: Mask = field(compare=False)
    messages: NDArray[np.float32] = field(compare=False)
    multipliers: Array = field(compare=False)


class Tree:
    """`run` returns a lower bound; `is_complete` then says that nothing is cheaper than the incumbent.

    Args:
        chains: at the root's state.
        incumbent: cost to beat; math.inf if there is none.
        visit: offered a choice, or None to look for one (now and then, while penalties guide the chains to one
            branch); returns the incumbent's cost.
    """

    def __init__(self, chains: Chains, incumbent: float, visit: Callable[[Integers | None], float]) -> None:
        self.chains, self.incumbent, self.visit = chains, incumbent, visit
        self.base = chains.base
        self.term_first = np.cumsum(chains.term_size) - chains.term_size
        spread = incumbent - chains.bound if math.isfinite(incumbent) else self._largest()
        self.penalty = 2.0 * spread + 1_000.0
        self.count = 0
        self.is_complete = False
        self.deadline = math.inf

    def _largest(self) -> float:
        """More than legal choices can differ in cost."""
        tables = [v.higher.tables for v in self.chains.visits if v.higher is not None]
        legal = [float(t[np.isfinite(t)].max(initial=0.0)) for t in tables]
        widths = [v.higher.widths.size for v in self.chains.visits if v.higher is not None]
        return float(np.abs(self.base).sum()) + sum(a * b for a, b in zip(legal, widths, strict=True))

    @property
    def _cutoff(self) -> float:
        return self.incumbent - 1.0 + self.chains.tolerance

    def run(self, deadline: float, visit_every: int) -> float:
        """Search until proven or `deadline` (perf_counter)."""
        self.deadline = deadline
        root = self._propagate(np.zeros(len(self.base), dtype=bool))
        heap: list[_Open] = [] if root is None else [self._remember(self.chains.bound, root)]
        while heap:
            top = heapq.heappop(heap)
            if top.bound > self._cutoff:
                return self._close()
            if time.perf_counter() > deadline:
                return self._close(top.bound)
            self._recall(top)
            self.chains.sweep()
            if self.count % visit_every == 0:
                self.incumbent = min(self.incumbent, self.visit(None))
            for child in self._children(top):
                heapq.heappush(heap, child)
        return self._close()

    def _close(self, bound: float = math.inf) -> float:
        self.chains.unary = self.base
        self.is_complete = bound == math.inf
        return min(bound, self.incumbent)

    def _remember(self, bound: float, banned: Mask) -> _Open:
        self.count += 1
        chains = self.chains
        return _Open(bound, self.count, banned, chains.messages.astype(np.float32), chains.multipliers.copy())

    def _recall(self, node: _Open) -> None:
        chains = self.chains
        chains.unary = self.base + self.penalty * node.banned
        chains.messages, chains.multipliers = node.messages.astype(np.float64), node.multipliers.copy()

    def _children(self, node: _Open) -> list[_Open]:
        own, side = self._split(node.banned)
        found = []
        if side is None:
            only = [int(np.argmin(part)) for part in np.split(node.banned, self.chains.first[1:-1])]
            self.incumbent = min(self.incumbent, self.visit(np.array(only, dtype=np.int64)))
            return []
        for part in (side, ~side):
            banned = node.banned.copy()
            banned[own] |= ~part
            child = self._bounded(node, banned)
            if child is not None:
                found.append(child)
        return found

    def _bounded(self, parent: _Open, banned: Mask) -> _Open | None:
        """The child with its bound, or None if it holds nothing better than the incumbent."""
        allowed = self._propagate(banned)
        if allowed is None:
            return None
        chains = self.chains
        self._recall(_Open(parent.bound, 0, allowed, parent.messages, parent.multipliers))
        chains.least.fill(-np.inf)
        has_incumbent = math.isfinite(self.incumbent)
        target = self.incumbent if has_incumbent else parent.bound + 0.1 * abs(parent.bound) + 1.0
        bound = max(
            parent.bound, climb(chains, target, least_sweeps=CHILD_SWEEPS, least_gain=0.02, deadline=self.deadline)
        )
        if bound > self._cutoff:
            return None
        if has_incumbent:
            allowed = self._propagate(allowed | (chains.least > self._cutoff))
            if allowed is None:
                return None
        return self._remember(bound, allowed)

    def _propagate(self, banned: Mask) -> Mask | None:
        """Ban what no row can bear; None if some node has nothing left or a row is broken."""
        chains = self.chains
        count = len(chains.limits) + 1
        for _ in range(PROPAGATIONS):
            if len(banned) and np.logical_and.reduceat(banned, chains.first[:-1]).any():
                return None
            if not len(chains.amount):
                return banned
            least = np.minimum.reduceat(np.where(banned[chains.amount_at], np.inf, chains.amount), self.term_first)
            change = np.bincount(chains.term_begin, least, count) - np.bincount(chains.term_end, least, count)
            left = chains.limits - np.cumsum(change)[:-1]
            if left.min() < 0:
                return None
            room = range_least(left, chains.term_begin, chains.term_end)
            doomed = chains.amount > np.repeat(least + room, chains.term_size)
            doomed &= ~banned[chains.amount_at]
            if not doomed.any():
                return banned
            banned = banned.copy()
            banned[chains.amount_at[doomed]] = True
        if np.logical_and.reduceat(banned, chains.first[:-1]).any():
            return None
        return banned

    def _split(self, banned: Mask) -> tuple[slice, Mask | None]:
        """Node to branch on and the strategies of the first branch; None if no node has a choice left."""
        chains = self.chains
        starts = chains.first[:-1]
        spread = min(self.incumbent, chains.bound + 0.1 * abs(chains.bound) + 50.0) - chains.bound
        share = np.where(banned, 0.0, chains.weights(max(0.02 * spread, 1e-3)))
        if len(chains.amount):
            price = chains.priced_usage()
            mean = np.add.reduceat(share * price, starts)
            variance = np.add.reduceat(share * price**2, starts) - mean**2
            k = int(np.argmax(variance))
            own = slice(int(chains.first[k]), int(chains.first[k + 1]))
            side = price[own] <= mean[k]
            if variance[k] > LEAST_VARIANCE and (side & ~banned[own]).any() and (~side & ~banned[own]).any():
                return own, side
        left = np.add.reduceat(~banned, starts, dtype=np.int64)
        entropy = -np.add.reduceat(share * np.log(np.maximum(share, 1e-300)), starts)
        k = int(np.argmax(np.where(left > 1, entropy + 1.0, 0.0)))
        own = slice(int(chains.first[k]), int(chains.first[k + 1]))
        if left[k] < 2:
            return own, None
        reduced = np.where(banned[own], np.inf, chains.total[own])
        return own, np.arange(own.stop - own.start) == int(np.argmin(reduced))
