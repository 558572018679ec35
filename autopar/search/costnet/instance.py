"""A cost network with liveness rows: what is given, read from the format of google/iopddl, and what a choice costs.

Node i lives during the half-open interval [start_i, stop_i) and takes one of its strategies p, which costs c_ip and
occupies u_ip. An edge (i, j) costs r_ij[p, q]; edges may name the same pair twice, then both count.

    minimise  sum_i c_ip + sum_(i,j) r_ij[p, q]   subject to   sum_(i alive at t) u_ip <= limit for every time t

All figures are integers; a cost of at least `FORBIDDEN` forbids the strategy or the pair.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError

FORBIDDEN = 10**17
"""Costs from here on forbid (the format writes 10^18)."""
GZIP_MAGIC = b"\x1f\x8b"

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Instance:
    """Flat arrays, integers throughout.

    Attributes:
        name: the instance's own name.
        start, stop: [nodes], the life of each node.
        first: [nodes + 1], where each node's strategies begin in `cost` and `usage`.
        cost, usage: [strategies].
        ends: [edges, 2], the nodes of each edge.
        first_pair: [edges + 1], where each edge's row-major table begins in `pair_cost`.
        pair_cost: [pairs].
        limit: usage allowed at every time.
    """

    name: str
    start: Integers
    stop: Integers
    first: Integers
    cost: Integers
    usage: Integers
    ends: Integers
    first_pair: Integers
    pair_cost: Integers
    limit: int

    @property
    def num_nodes(self) -> int:
        return len(self.start)

    @property
    def num_strategies(self) -> int:
        return len(self.cost)

    @property
    def num_pairs(self) -> int:
        return len(self.pair_cost)

    def evaluate(self, choice: Sequence[int] | Integers) -> tuple[int | None, int]:
        """Exact cost (None if something forbidden is chosen) and the largest excess over `limit` (0 if none)."""
        chosen = np.asarray(choice, dtype=np.int64)
        sizes = np.diff(self.first)
        if len(chosen) != self.num_nodes or np.any((chosen < 0) | (chosen >= sizes)):
            raise InputError("a choice needs one strategy of each node")
        at = self.first[:-1] + chosen
        own = self.cost[at]
        i, j = self.ends[:, 0], self.ends[:, 1]
        both = self.pair_cost[self.first_pair[:-1] + chosen[i] * sizes[j] + chosen[j]]
        is_legal = not (np.any(own >= FORBIDDEN) or np.any(both >= FORBIDDEN))
        excess = max(self.peak(at) - self.limit, 0)
        return (sum(own.tolist()) + sum(both.tolist()) if is_legal else None), excess

    def peak(self, at: Integers) -> int:
        """Largest usage over time of the strategies `at` (flat numbers, one per node)."""
        alive = self.stop > self.start
        used = self.usage[at][alive]
        times = np.concatenate([self.stop[alive], self.start[alive]])
        change = np.concatenate([-used, used])
        order = np.argsort(times, kind="stable")  # ends come first, so a node that ends makes room for one that starts
        return int(np.max(np.cumsum(change[order]), initial=0))


def read_instance(path: Path) -> Instance:
    """Read a JSON file of the contest's format, gzip-compressed or plain; InputError if it is none."""
    raw = path.read_bytes()
    if raw.startswith(GZIP_MAGIC):
        raw = gzip.decompress(raw)
    try:
        problem = json.loads(raw)["problem"]
        return make_instance(problem, path.name.split(".")[0])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an instance of the iopddl format ({error!r})") from error


def make_instance(problem: dict[str, Any], name: str = "") -> Instance:
    """Instance from the format's `problem` object; ValueError if sizes do not match."""
    nodes, edges = problem["nodes"], problem["edges"]
    first = _starts(nodes["costs"])
    first_pair = _starts(edges["costs"])
    intervals = np.array(nodes["intervals"], dtype=np.int64).reshape(-1, 2)
    ends = np.array(edges["nodes"], dtype=np.int64).reshape(-1, 2)
    sizes = np.diff(first)
    if len(intervals) != len(sizes) or np.any(_starts(nodes["usages"]) != first):
        raise ValueError("intervals, costs and usages differ in length")
    if len(ends) != len(first_pair) - 1 or np.any(sizes[ends[:, 0]] * sizes[ends[:, 1]] != np.diff(first_pair)):
        raise ValueError("an edge's table does not fit its nodes")
    return Instance(
        str(problem.get("name", name)),
        intervals[:, 0],
        intervals[:, 1],
        first,
        _flat(nodes["costs"], int(first[-1])),
        _flat(nodes["usages"], int(first[-1])),
        ends,
        first_pair,
        _flat(edges["costs"], int(first_pair[-1])),
        int(problem["usage_limit"]),
    )


def _starts(lists: Sequence[Sequence[int]]) -> Integers:
    return np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)


def _flat(lists: Sequence[Sequence[int]], count: int) -> Integers:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int64, count=count)
