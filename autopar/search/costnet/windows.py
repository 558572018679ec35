"""Improvement of a choice by exact moves of many nodes at once.

A window is a connected set of nodes; all others stay. Within it the network is minimised exactly by elimination, with
prices on the rows. If the result breaks rows, their prices rise by what the current choice says they are worth at most,

    price_r += (cost of the current choice - cost found) / excess_r,

and the window is minimised again, a few times. A result that fits and costs no more is taken; taking equal ones moves
along plateaus.
"""

from __future__ import annotations

import numpy as np

from autopar.ir.cost import Array
from autopar.search.costnet.dual import Chains
from autopar.search.costnet.primal import Answer, Slack
from autopar.search.costnet.rows import Integers
from autopar.search.reduce import Network, Plan, make_plan, run_plan

LARGEST_TABLE = 1_000_000
"""Entries of the largest table of an elimination; nodes that would need more stay as they are."""
PRICE_ROUNDS = 4
REPAIR_ROUNDS = 8
ILLEGAL = 1e14
"""Stands for a forbidden pair between a window and its surroundings, which another window may mend."""


class Windows:
    """Improves one choice in place; `cost` is that of the model, without its constant."""

    def __init__(self, chains: Chains, answer: Answer, seed: int = 0) -> None:
        self.chains = chains
        self.choice = answer.choice.copy()
        self.slack = Slack(chains)
        for k, p in enumerate(self.choice.tolist()):
            self.slack.take(k, p)
        self.cost = self._value()
        self.random = np.random.default_rng(seed)
        self.near = [
            [int(n) for star in (visit.lower, visit.higher) if star is not None for n in star.near]
            for visit in chains.visits
        ]
        self.order = np.zeros(0, dtype=np.int64)
        self.heavy = [k for k, terms in enumerate(self.slack.terms) if terms]
        self.steps = 0

    def _value(self) -> float:
        """Cost with forbidden pairs counted as ILLEGAL."""
        chains = self.chains
        total = chains.constant + float(chains.base[chains.first[:-1] + self.choice].sum())
        for k, visit in enumerate(chains.visits):
            if visit.higher is not None:
                columns = visit.higher.cuts + self.choice[visit.higher.near]
                total += float(np.minimum(visit.higher.tables[self.choice[k], columns], ILLEGAL).sum())
        return total

    def answer(self) -> Answer:
        cost = self.cost if self.cost < ILLEGAL / 2 else np.inf
        return Answer(self.choice.copy(), cost, self.breach()[0])

    def breach(self) -> tuple[float, float]:
        """Largest excess over a row, and the sum of all."""
        over = np.maximum(-self.slack.left, 0.0)
        return float(over.max(initial=0.0)), float(over.sum())

    def step(self, size: int, tolerance: float = 0.0) -> bool:
        """Try one window of about `size` nodes; results up to `tolerance` dearer are taken too.

        Every other window joins the surroundings of nodes that share a row, the first of which must change its usage.
        """
        self.steps += 1
        if self.heavy and self.slack.left.min() < 0:
            return self._repair(size)
        if self.steps % 2 and self.heavy:
            seeds = self._sharing()
            nodes = sorted(set().union(*(self._grow(seed, max(size // len(seeds), 1)) for seed in seeds)))
            return self._move(nodes, tolerance, seeds[0])
        if not len(self.order):
            self.order = self.random.permutation(len(self.choice))
        seed, self.order = int(self.order[-1]), self.order[:-1]
        return self._move(sorted(self._grow(seed, size)), tolerance)

    def _sharing(self) -> list[int]:
        """One to three nodes with usage in one row."""
        first = self.heavy[int(self.random.integers(len(self.heavy)))]
        begin, end, _ = self.slack.terms[first][int(self.random.integers(len(self.slack.terms[first])))]
        row = begin + int(np.argmin(self.slack.left[begin:end]))
        others = self.users(row)
        more = self.random.choice(others, min(len(others), int(self.random.integers(0, 3))), replace=False).tolist()
        return [first, *(int(k) for k in more if k != first)]

    def users(self, row: int) -> Integers:
        """Nodes with usage in a row."""
        chains = self.chains
        return chains.term_node[(chains.term_begin <= row) & (row < chains.term_end)]

    def _grow(self, seed: int, size: int) -> set[int]:
        """Connected nodes, found in random order."""
        inside, border = {seed}, [seed]
        while border and len(inside) < size:
            at = border.pop(int(self.random.integers(len(border))))
            fresh = [n for n in self.near[at] if n not in inside]
            inside.update(fresh[: size - len(inside)])
            border += fresh
        return inside

    def _move(self, nodes: list[int], tolerance: float, forced: int | None = None) -> bool:
        nodes, plan, pairs = self._fitted(nodes)
        if not nodes or (forced is not None and forced not in nodes):
            return False
        old = [int(self.choice[k]) for k in nodes]
        unary = self._outer(nodes)
        for k, p in zip(nodes, old, strict=True):
            self.slack.take(k, p, -1.0)
        network = Network(tuple(unary), pairs)
        before = network.value(old)
        new = self._minimise(nodes, network, plan, before + tolerance, forced)
        for k, p in zip(nodes, old if new is None else new, strict=True):
            self.choice[k] = p
            self.slack.take(k, p)
        if new is None:
            return False
        change = network.value(new) - before
        self.cost += change
        return change < 0

    def _fitted(self, nodes: list[int]) -> tuple[list[int], Plan, dict[tuple[int, int], Array]]:
        """The nodes that elimination can take, their plan and their tables."""
        while True:
            pairs = self._pairs(nodes)
            plan = make_plan(tuple(int(self.chains.sizes[k]) for k in nodes), sorted(pairs), LARGEST_TABLE)
            if not plan.core:
                return nodes, plan, pairs
            core = set(plan.core)
            nodes = [k for position, k in enumerate(nodes) if position not in core]

    def _pairs(self, nodes: list[int]) -> dict[tuple[int, int], Array]:
        position = {k: at for at, k in enumerate(nodes)}
        pairs = {}
        for k in nodes:
            star = self.chains.visits[k].higher
            if star is None:
                continue
            for other, cut, width in zip(star.near.tolist(), star.cuts.tolist(), star.widths.tolist(), strict=True):
                if other in position:
                    pairs[position[k], position[other]] = star.tables[:, cut : cut + width]
        return pairs

    def _outer(self, nodes: list[int]) -> list[Array]:
        """Costs of the window's nodes with all neighbours outside fixed."""
        inside = set(nodes)
        unary = []
        for k in nodes:
            visit = self.chains.visits[k]
            cost = self.chains.base[visit.own]
            for star in (visit.lower, visit.higher):
                if star is not None:
                    outside = np.array([int(n) not in inside for n in star.near])
                    columns = (star.cuts + self.choice[star.near])[outside]
                    cost = cost + np.minimum(star.tables[:, columns], ILLEGAL).sum(axis=1)
            unary.append(cost)
        return unary

    def _minimise(
        self, nodes: list[int], network: Network, plan: Plan, most: float, forced: int | None
    ) -> tuple[int, ...] | None:
        """The best fitting result found that costs at most `most`."""
        terms = [self.slack.terms[k] for k in nodes]
        fits = []
        for k, cost in zip(nodes, network.unary, strict=True):
            excess = self.slack.excess(k)
            fits.append(cost if excess is None else np.where(excess > 0, np.inf, cost))
            if k == forced:
                same = [amount == amount[self.choice[k]] for _, _, amount in self.slack.terms[k]]
                fits[-1] = np.where(np.all(same, axis=0), np.inf, fits[-1])
        prices: dict[int, float] = {}
        for _ in range(PRICE_ROUNDS):
            unary = [cost + _priced(own, prices) if own else cost for own, cost in zip(terms, fits, strict=True)]
            found = run_plan(plan, Network(tuple(unary), network.pairs)).choice
            if found is None:
                return None
            value = network.value(found)
            if value > most:
                return None
            broken = self._over(terms, found)
            if not broken:
                return found
            for row, amount in broken.items():
                prices[row] = prices.get(row, 0.0) + 1.1 * max(most - value, 1.0) / amount
        return None

    def _repair(self, size: int) -> bool:
        """Lower the sum of excesses around users of the most broken row; cost is secondary."""
        row = int(np.argmin(self.slack.left))
        users = self.users(row)
        seeds = self.random.choice(users, min(len(users), int(self.random.integers(1, 5))), replace=False).tolist()
        nodes = sorted(set().union(*(self._grow(int(seed), max(size // len(seeds), 1)) for seed in seeds)))
        nodes, plan, pairs = self._fitted(nodes)
        if not nodes:
            return False
        unary, old = self._outer(nodes), [int(self.choice[k]) for k in nodes]
        before = self.breach()[1]
        for k, p in zip(nodes, old, strict=True):
            self.slack.take(k, p, -1.0)
        terms = [self.slack.terms[k] for k in nodes]
        best = (before, Network(tuple(unary), pairs).value(old), tuple(old))
        price = 1e-3 * max(float(np.ptp(np.minimum(cost, ILLEGAL))) for cost in unary) + 1.0
        prices = np.zeros(len(self.slack.left))
        for _ in range(REPAIR_ROUNDS):
            network = Network(tuple(unary), pairs)
            reach = np.concatenate([[0.0], np.cumsum(prices)])
            priced = tuple(
                cost + sum((reach[end] - reach[begin]) * amount for begin, end, amount in own)
                for own, cost in zip(terms, unary, strict=True)
            )
            found = run_plan(plan, Network(priced, pairs)).choice
            if found is None:
                break
            over = np.maximum(self._used(terms, found) - self.slack.left, 0.0)
            best = min(best, (float(over.sum()), network.value(found), found))
            worst = float(over.max(initial=0.0))
            if worst == 0:
                break
            prices += price * over / worst / worst
            price *= 4.0
        for k, p in zip(nodes, best[2], strict=True):
            self.choice[k] = p
            self.slack.take(k, p)
        self.cost = self._value() if best[2] != tuple(old) else self.cost
        return best[0] < before

    def _used(self, terms: list[list[tuple[int, int, Array]]], found: tuple[int, ...]) -> Array:
        used = np.zeros_like(self.slack.left)
        for own, p in zip(terms, found, strict=True):
            for begin, end, amount in own:
                if amount[p] > 0:
                    used[begin:end] += amount[p]
        return used

    def _over(self, terms: list[list[tuple[int, int, Array]]], found: tuple[int, ...]) -> dict[int, float]:
        """The most broken row of each breach."""
        if not any(own for own in terms):
            return {}
        used = self._used(terms, found)
        excess = used - self.slack.left
        worst = int(np.argmax(excess))
        return {worst: float(excess[worst])} if excess[worst] > 0 else {}


def _priced(own: list[tuple[int, int, Array]], prices: dict[int, float]) -> Array | float:
    total: Array | float = 0.0
    for begin, end, amount in own:
        price = sum(value for row, value in prices.items() if begin <= row < end)
        if price:
            total = total + price * amount
    return total
