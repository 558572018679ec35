"""Choices: decoding from messages, and improvement by moves of one node.

All work on the numbering of `Chains`: one strategy per existing node. Usage is kept below the limits; where no strategy
of a node fits, the one that breaks the rows least is taken, and the choice is reported as what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.ir.cost import Array
from autopar.search.costnet.dual import Chains, Visit
from autopar.search.costnet.rows import Integers


@dataclass(frozen=True)
class Answer:
    """A choice, its cost in the model (inf if forbidden pairs are used) and its largest excess over a row."""

    choice: Integers
    cost: float
    excess: float

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Smaller is better: legal ones first, then least excess, then least cost."""
        return not np.isfinite(self.cost), self.excess, self.cost


class Slack:
    """What each row has left, and the strategies of a node that fit in."""

    def __init__(self, chains: Chains) -> None:
        self.left = chains.limits.copy()
        self.terms: list[list[tuple[int, int, Array]]] = [[] for _ in chains.sizes]
        at = np.cumsum(chains.term_size) - chains.term_size
        for k, begin, end, first, size in zip(
            chains.term_node.tolist(),
            chains.term_begin.tolist(),
            chains.term_end.tolist(),
            at.tolist(),
            chains.term_size.tolist(),
            strict=True,
        ):
            self.terms[k].append((begin, end, chains.amount[first : first + size]))

    def excess(self, node: int) -> Array | None:
        """Per strategy the largest excess that it would cause (0 where it fits); None if the node is in no row."""
        terms = self.terms[node]
        if not terms:
            return None
        worst = terms[0][2] - self.left[terms[0][0] : terms[0][1]].min()
        for begin, end, amount in terms[1:]:
            worst = np.maximum(worst, amount - self.left[begin:end].min())
        return np.asarray(np.maximum(worst, 0.0))

    def take(self, node: int, p: int, sign: float = 1.0) -> None:
        for begin, end, amount in self.terms[node]:
            self.left[begin:end] -= sign * amount[p]


def decode(chains: Chains, upward: bool) -> Answer:
    """Fix nodes in the order of a pass: fixed neighbours by their tables, the others by their messages."""
    costs, choice, slack = chains.costs(), np.zeros(len(chains.sizes), dtype=np.int64), Slack(chains)
    order = range(len(chains.sizes))
    for k in order if upward else reversed(order):
        visit = chains.visits[k]
        behind, ahead = (visit.lower, visit.higher) if upward else (visit.higher, visit.lower)
        cost = costs[visit.own]
        if ahead is not None:
            cost = cost + chains.messages[visit.into[ahead.members]].sum(axis=0)
        if behind is not None:
            cost = cost + behind.tables[:, behind.cuts + choice[behind.near]].sum(axis=1)
        choice[k] = _best(cost, slack.excess(k))
        slack.take(k, int(choice[k]))
    return improve(chains, choice)


def _best(cost: Array, excess: Array | None) -> int:
    """Cheapest legal strategy among those that fit; else the legal one of least excess; else the cheapest."""
    if excess is None:
        return int(np.argmin(cost))
    legal = np.isfinite(cost)
    if legal.any():
        least = excess[legal].min()
        cost = np.where(excess <= least, cost, np.inf)
    return int(np.argmin(cost))


def condition(chains: Chains, visit: Visit, costs: Array, choice: Integers) -> Array:
    """Cost of each strategy of a node when all others stay."""
    cost = costs[visit.own]
    for star in (visit.lower, visit.higher):
        if star is not None:
            cost = cost + star.tables[:, star.cuts + choice[star.near]].sum(axis=1)
    return cost


def improve(chains: Chains, choice: Integers, max_rounds: int = 20) -> Answer:
    """Moves of single nodes until none helps."""
    slack = Slack(chains)
    for k, p in enumerate(choice.tolist()):
        slack.take(k, p)
    todo = set(range(len(choice)))
    for _ in range(max_rounds):
        moved: set[int] = set()
        for k in sorted(todo):
            p = int(choice[k])
            visit = chains.visits[k]
            cost = condition(chains, visit, chains.base, choice)
            slack.take(k, p, -1.0)
            excess = slack.excess(k)
            best = _best(cost, excess)
            if excess is None or (excess[best], cost[best]) < (excess[p], cost[p]):
                is_better = cost[best] < cost[p] or (excess is not None and excess[best] < excess[p])
                if is_better:
                    choice[k] = best
                    moved |= {k, *_neighbours(visit)}
            slack.take(k, int(choice[k]))
        todo = moved
        if not todo:
            break
    return assess(chains, choice, slack)


def _neighbours(visit: Visit) -> list[int]:
    return [int(n) for star in (visit.lower, visit.higher) if star is not None for n in star.near]


def evaluate(chains: Chains, choice: Integers) -> Answer:
    """A choice as it is."""
    slack = Slack(chains)
    for k, p in enumerate(choice.tolist()):
        slack.take(k, p)
    return assess(chains, choice, slack)


def assess(chains: Chains, choice: Integers, slack: Slack) -> Answer:
    """Cost and excess; `slack` is what the choice leaves."""
    total = chains.constant + float(chains.base[chains.first[:-1] + choice].sum())
    for k, visit in enumerate(chains.visits):
        if visit.higher is not None:
            total += float(visit.higher.tables[choice[k], visit.higher.cuts + choice[visit.higher.near]].sum())
    return Answer(choice, total, max(0.0, -float(slack.left.min(initial=0.0))))
