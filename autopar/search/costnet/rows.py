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
    limits = limits.copy()
    drop = np.zeros(len(limits) + 1)
    stripped = [[_strip(term, drop) for term in own] for own in terms]
    limits -= np.cumsum(drop)[:-1]
    keep = _binding(stripped, limits)
    number = np.concatenate([[0], np.cumsum(keep)])
    renumbered = [_renumber(own, number) for own in stripped]
    return renumbered, limits[keep], keep


def _strip(term: Term, drop: Array) -> Term:
    least = float(term.amount.min())
    if least == 0:
        return term
    drop[term.begin] += least
    drop[term.end] -= least
    return Term(term.begin, term.end, term.amount - least)


def _binding(terms: Sequence[Sequence[Term]], limits: Array) -> NDArray[np.bool_]:
    count = len(limits)
    flat = [(term.begin, term.end, float(term.amount.max())) for own in terms for term in own]
    flat = [entry for entry in flat if entry[2] > 0 and entry[1] > entry[0]]
    if not flat:
        return limits < 0
    begin = np.array([entry[0] for entry in flat])
    end = np.array([entry[1] for entry in flat])
    largest = np.array([entry[2] for entry in flat])
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


def _renumber(own: Sequence[Term], number: Integers) -> list[Term]:
    merged: dict[tuple[int, int], Array] = {}
    for term in own:
        begin, end = int(number[term.begin]), int(number[term.end])
        if begin < end and term.amount.max() > 0:
            merged[begin, end] = merged.get((begin, end), 0.0) + term.amount
    return [Term(begin, end, amount) for (begin, end), amount in sorted(merged.items())]


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
