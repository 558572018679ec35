"""Branch: closes the gap that multipliers leave on a fixed layout, by HiGHS on small cores and by splitting domains.

A core holds the strategies whose min-marginal under the best multipliers lies below a ceiling. The ceiling starts just
above the bound and grows (`WINDOWS`): a solution below it is optimal, none proves the ceiling a bound. Where the core
stays too large for HiGHS the layout is split: the node whose strategies differ most, between the points of the master's
solution, in what they use of the binding rows keeps its frugal strategies in one half and the others in the other, and
each half gets its own multipliers.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.bounds import LayoutBound, Offer, padded, tighten
from autopar.search.evaluate import MEMORY_TOLERANCE
from autopar.search.ilp import Row
from autopar.search.presolve import solve_reduced
from autopar.search.problem import Weights
from autopar.search.reduce import min_marginals, restrict
from autopar.search.rows import LinearRow, combine

WINDOWS = (1 / 32, 1 / 8, 1 / 2, 1.0)
"""Fractions of the gap that HiGHS is asked to search, in turn."""
MAX_ILPS = 40
"""Programs per window; each adds memory rows that the last one's answer broke."""
MAX_BRANCHES = 60
"""Halves made per layout; what is left then stays as gap."""


def close_gap(work: LayoutBound, offer: Offer, tolerance: float) -> None:
    """Raise `work.bound` to the layout's optimum, to the offered cutoff, or as far as `MAX_BRANCHES` allows."""
    count = itertools.count()
    open_leaves = [(work.bound, next(count), work)]
    done = math.inf
    branches = 0
    while open_leaves:
        bound, _, leaf = heapq.heappop(open_leaves)
        if not leaf.points or bound >= offer(leaf.points[0][0]):
            done = min(done, bound)
            continue
        if _search_windows(leaf, offer, tolerance):
            done = min(done, leaf.bound)
            continue
        halves = _split(leaf) if branches < MAX_BRANCHES else []
        if not halves:
            done = min(done, leaf.bound)
        for half in halves:
            branches += 1
            tighten(half, offer, tolerance)
            heapq.heappush(open_leaves, (half.bound, next(count), half))
    work.bound = max(work.bound, done)


def _search_windows(work: LayoutBound, offer: Offer, tolerance: float) -> bool:
    """Whether HiGHS settled the leaf: `work.bound` is exact or reaches the cutoff."""
    start = work.bound
    for fraction in WINDOWS:
        cutoff = offer(work.points[0][0])
        if work.bound >= cutoff:
            return True
        ceiling = start + fraction * (cutoff - start) if math.isfinite(cutoff) else cutoff
        if ceiling <= work.bound:
            continue
        settled = _search_window(work, offer, ceiling, tolerance)
        if settled is not None:
            return settled
        if not math.isfinite(cutoff):
            return True
    return work.bound >= offer(work.points[0][0])


def _search_window(work: LayoutBound, offer: Offer, ceiling: float, tolerance: float) -> bool | None:
    """True: settled. False: too large for HiGHS. None: nothing lies below the ceiling, which is now the bound."""
    problem = work.problem
    for _ in range(MAX_ILPS):
        keep = _survivors(work, ceiling)
        if any(len(k) == 0 for k in keep):
            work.bound = max(work.bound, ceiling)
            return None
        objective = restrict(problem.network(work.base), keep)
        rows = [Row(restrict(problem.network(r.weights), keep), _limit(r), r.tau_coefficient) for r in work.rows]
        result, choice = solve_reduced(objective, rows, tau_cost=work.tau_cost, relative_gap=tolerance)
        if choice is None:
            if result.status == "infeasible":
                work.bound = max(work.bound, ceiling)
            return None if result.status == "infeasible" else False
        bound = result.bound + work.base.constant
        work.bound = max(work.bound, min(ceiling, bound))
        original = tuple(int(k[p]) for k, p in zip(keep, choice, strict=True))
        if work.bound >= offer(original):
            return True
        if not work.add_memory_rows(original, problem.block_totals(original)):
            return True if bound <= ceiling else None
    return False


def _limit(row: LinearRow) -> float:
    """Limit for the solver: what the functional's constant leaves, loosened by the memory tolerance."""
    slack = MEMORY_TOLERANCE * row.limit if row.tau_coefficient <= 0 else 0.0
    return row.limit + slack - row.weights.constant


def _survivors(work: LayoutBound, ceiling: float) -> list[NDArray[np.int64]]:
    """Strategies of every node that some assignment below `ceiling` may use."""
    weights, constant = work.combined()
    run = work.problem.run(weights)
    if run.choice is None or not math.isfinite(ceiling):
        return [np.arange(size) for size in work.problem.sizes]
    margin = 1e-9 * abs(ceiling)
    return [np.flatnonzero(cost + constant <= ceiling + margin) for cost in min_marginals(run)]


def _split(work: LayoutBound) -> list[LayoutBound]:
    """Two halves of the layout's strategies, or none where the master's points do not disagree."""
    if len(work.shares) < 2:
        return []
    weights = combine(
        [(float(m), row.weights) for m, row in zip(padded(work.multipliers, len(work.rows)), work.rows, strict=True)]
    )
    usage = work.problem.network(weights).unary
    picks = np.array([choice for choice, _ in work.points[: len(work.shares)]])
    used = np.array([cost[picks[:, i]] for i, cost in enumerate(usage)])
    mean = used @ work.shares
    spread = ((used - mean[:, None]) ** 2) @ work.shares
    node = int(np.argmax(spread))
    if spread[node] <= 1e-12 * max(mean[node] ** 2, 1e-300):
        return []
    frugal = usage[node] <= mean[node]
    return [_half(work, node, frugal), _half(work, node, ~frugal)]


def _half(work: LayoutBound, node: int, allowed: NDArray[np.bool_]) -> LayoutBound:
    barrier: Array = np.where(allowed, 0.0, np.inf)
    nothing = np.zeros((work.problem.num_blocks + 1, work.problem.num_weights))
    return replace(
        work,
        base=combine([(1.0, work.base), (1.0, Weights(nothing, extra={node: barrier}))]),
        rows=list(work.rows),
        points=[point for point in work.points if allowed[point[0][node]]],
        shares=np.zeros(0),
    )
