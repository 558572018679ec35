"""Liveness rows: which times can bind, and what is left of each when the part that every choice pays is taken off.

A term says that node i uses `amount[p]` in rows [begin, end). Rows stand in the order of time, so a life is one range.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Term:
    """Usage of one node in rows [begin, end), by strategy."""

    begin: int
    end: int
    amount: Array


def event_rows(start: Integers, stop: Integers) -> tuple[Integers, Integers]:
    """Rows [begin, end) of half-open lives: one row for every distinct start, for only there usage can rise."""
    times = np.unique(start[stop > start])
    return np.searchsorted(times, start), np.where(stop > start, np.searchsorted(times, stop), 0)


def settle(terms: Sequence[list[Term]], limits: Array) -> tuple[list[list[Term]], Array, NDArray[np.bool_]]:
    """Equivalent terms and limits without rows that cannot bind, and which rows stayed.

    Least amounts move to the limits; terms that are zero or meet no row go; a row goes where the largest amounts fit,
    or where a neighbouring row holds all its terms under no larger limit. Terms of a node over the same rows add up.
    """
    flat = [term for own in terms for term in own]
    if not flat:
        keep = limits < 0
        return [[] for _ in terms], limits[keep], keep
    count = len(limits) + 1
    begin = np.array([term.begin for term in flat])
    end = np.array([term.end for term in flat])
    sizes = np.array([len(term.amount) for term in flat])
    amounts, starts = np.concatenate([term.amount for term in flat]), np.cumsum(sizes) - sizes
    least = np.minimum.reduceat(amounts, starts)
    largest = np.maximum.reduceat(amounts, starts) - least
    drop = np.bincount(begin, least, count) - np.bincount(end, least, count)
    limits = limits - np.cumsum(drop)[:-1]
    used = (largest > 0) & (end > begin)
    keep = _binding(begin[used], end[used], largest[used], limits)
    number = np.concatenate([[0], np.cumsum(keep)])
    fresh = zip(number[begin].tolist(), number[end].tolist(), least.tolist(), largest.tolist(), flat, strict=True)
    renewed = [
        Term(a, b, term.amount - low if low else term.amount) if a < b and high > 0 else None
        for a, b, low, high, term in fresh
    ]
    stream = iter(renewed)
    return [_joined([next(stream) for _ in own]) for own in terms], limits[keep], keep


def _binding(begin: Integers, end: Integers, largest: Array, limits: Array) -> NDArray[np.bool_]:
    count = len(limits)
    change = np.bincount(begin, largest, count + 1) - np.bincount(end, largest, count + 1)
    keep = np.asarray(np.cumsum(change)[:-1] > limits)
    enters, leaves = np.bincount(begin, minlength=count + 1), np.bincount(end, minlength=count + 1)
    total_in, total_out = np.cumsum(enters), np.cumsum(leaves)
    while True:
        rows = np.flatnonzero(keep)
        if len(rows) < 2:
            return keep
        a, b = rows[:-1], rows[1:]
        # Terms that began after a and ended by b are in neither; counting them as both is safe.
        none_leaves = total_out[b] == total_out[a]
        none_enters = total_in[b] == total_in[a]
        drop_a = none_leaves & (limits[a] >= limits[b])
        drop_b = none_enters & (limits[b] >= limits[a]) & ~drop_a  # of equal rows one stays
        if not (drop_a.any() or drop_b.any()):
            return keep
        keep[a[drop_a]] = False
        keep[b[drop_b]] = False


def _joined(own: Sequence[Term | None]) -> list[Term]:
    """Without the missing ones, those over the same rows added up."""
    left = [term for term in own if term is not None]
    if len(left) < 2:
        return left
    merged: dict[tuple[int, int], Array] = {}
    for term in left:
        span = (term.begin, term.end)
        merged[span] = merged[span] + term.amount if span in merged else term.amount
    return [Term(begin, end, amount) for (begin, end), amount in sorted(merged.items(), key=lambda item: item[0])]


def range_least(values: Array, begin: Integers, end: Integers) -> Array:
    """[ranges]: least of values[begin:end], ranges not empty; by doubling windows."""
    levels = [values]
    while 2 ** len(levels) <= len(values):
        half = 2 ** (len(levels) - 1)
        last = levels[-1]
        levels.append(np.minimum(last[:-half], last[half:]))
    result = np.empty(len(begin))
    level = np.frexp(end - begin)[1] - 1
    for k in np.unique(level).tolist():
        at = np.flatnonzero(level == k)
        result[at] = np.minimum(levels[k][begin[at]], levels[k][end[at] - 2**k])
    return result


def segments(own: Sequence[Term]) -> Array:
    """[distinct row ranges, strategies]: usage of one node in every row where it has some."""
    if len(own) == 1:
        return own[0].amount[None, :]
    cuts = sorted({edge for term in own for edge in (term.begin, term.end)})
    return np.array(
        [sum((t.amount for t in own if t.begin <= a and t.end >= b), np.zeros(len(own[0].amount)))
         for a, b in itertools.pairwise(cuts)]
    )  # fmt: skip


def usage_of(terms: Sequence[Sequence[Term]], choice: Sequence[int], num_rows: int) -> Array:
    """[rows]: what a choice uses."""
    change = np.zeros(num_rows + 1)
    for own, p in zip(terms, choice, strict=True):
        for term in own:
            change[term.begin] += term.amount[p]
            change[term.end] -= term.amount[p]
    return np.cumsum(change)[:-1]
