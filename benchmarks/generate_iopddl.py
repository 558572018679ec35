"""Write a synthetic instance of the iopddl format: a training step of layers, forward, backward and optimizer.

    python benchmarks/generate_iopddl.py NODES FILE.json.gz [--seed 0] [--headroom 0.2]

Every tensor is laid out by one of 30 layouts, which split it into 1 to 64 parts. A node's strategies are the layouts
it supports: more parts use less memory and compute less, but gather more. Edges of elementwise ops forbid all but equal
layouts (permutation-like tables), others cost what moving the tensor between two layouts takes (dense tables).
Activations live from forward to backward, parameters all the time. The limit is
least peak + headroom * (peak of the cheapest strategies - least peak).
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NUM_LAYOUTS = 30
OPS_PER_LAYER = 24
FORBIDDEN = 10**18
PARTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Draft:
    """An instance in the making; `layouts[i]` are the layouts of node i's strategies."""

    random: np.random.Generator
    intervals: list[list[int]] = field(default_factory=list)
    costs: list[list[int]] = field(default_factory=list)
    usages: list[list[int]] = field(default_factory=list)
    layouts: list[np.ndarray] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = self.random.choice(PARTS, NUM_LAYOUTS)
        self.moves = self.random.integers(1, 8, (NUM_LAYOUTS, NUM_LAYOUTS)) * self.random.choice([1, 3], NUM_LAYOUTS)
        np.fill_diagonal(self.moves, 0)

    def node(self, start: int, size: int, work: int, like: int | None = None) -> int:
        """Add a node of `size` memory and `work` compute; with `like`, of the same layouts as that node."""
        count = int(self.random.integers(5, NUM_LAYOUTS + 1))
        own = np.sort(self.random.choice(NUM_LAYOUTS, count, replace=False)) if like is None else self.layouts[like]
        penalty = 1 + self.random.integers(0, 4, len(own)) * self.random.integers(0, 2, len(own))
        self.intervals.append([start, start + 1])
        gather = size * (self.parts[own] - 1) // self.parts[own] * penalty
        self.costs.append((work * penalty // self.parts[own] + gather).tolist())
        self.usages.append((size // self.parts[own]).tolist())
        self.layouts.append(own)
        return len(self.layouts) - 1

    def edge(self, i: int, j: int, size: int, *, is_strict: bool = False) -> None:
        """Moving `size` from i's layout to j's; strict edges allow equal layouts only (where any are)."""
        a, b = self.layouts[i], self.layouts[j]
        table = self.moves[np.ix_(a, b)] * size // 8
        equal = a[:, None] == b[None, :]
        if is_strict and equal.any(axis=1).all() and equal.any(axis=0).all():
            table = np.where(equal, 0, FORBIDDEN)
        self.ends.append([i, j])
        self.tables.append(table.ravel().tolist())

    def live_until(self, node: int, time: int) -> None:
        self.intervals[node][1] = max(self.intervals[node][1], time)


def generate(num_nodes: int, seed: int = 0, headroom: float = 0.2) -> dict[str, Any]:
    """The file's object; it has a little under or over `num_nodes` nodes."""
    random = np.random.default_rng(seed)
    draft = Draft(random)
    num_layers = max(1, num_nodes // (OPS_PER_LAYER * 3))
    forward, parameters = _forward(draft, num_layers)
    _backward(draft, forward, parameters)
    low, high = (_peak(draft, pick) for pick in (_leanest, _cheapest))
    problem = {
        "name": f"training-step-{num_nodes}-{seed}",
        "nodes": {"intervals": draft.intervals, "costs": draft.costs, "usages": draft.usages},
        "edges": {"nodes": draft.ends, "costs": draft.tables},
        "usage_limit": int(low + headroom * max(high - low, 0)),
    }
    return {"problem": problem}


def _forward(draft: Draft, num_layers: int) -> tuple[list[int], dict[int, int]]:
    """Ops in order, and the parameter that some of them read."""
    ops: list[int] = []
    parameters: dict[int, int] = {}
    random = draft.random
    for _ in range(num_layers * OPS_PER_LAYER):
        kind = random.random()
        size = int(random.integers(1, 64)) * 1024
        time = len(draft.layouts)
        if ops and kind < 0.5:
            op = draft.node(time, size, size // 64, like=ops[-1])
            draft.edge(ops[-1], op, size, is_strict=True)
        else:
            op = draft.node(time, size, size * int(random.integers(1, 30)))
            if ops:
                draft.edge(ops[-1], op, size)
        if ops and random.random() < 0.3:
            skip = ops[-int(random.integers(1, min(len(ops), OPS_PER_LAYER) + 1))]
            draft.edge(skip, op, size)
            draft.live_until(skip, len(draft.layouts))
        if kind > 0.7:
            parameters[op] = draft.node(0, size * 4, 0)
            draft.edge(parameters[op], op, size * 4)
        ops.append(op)
    return ops, parameters


def _backward(draft: Draft, forward: list[int], parameters: dict[int, int]) -> None:
    previous: int | None = None
    for op in reversed(forward):
        size = max(draft.usages[op])
        gradient = draft.node(len(draft.layouts), size, size * 8, like=op)
        draft.edge(op, gradient, size, is_strict=bool(draft.random.random() < 0.5))
        draft.live_until(op, len(draft.layouts))
        if previous is not None:
            draft.edge(previous, gradient, size)
            draft.live_until(previous, len(draft.layouts))
        if op in parameters:
            weight = parameters[op]
            update = draft.node(len(draft.layouts), size * 4, size, like=weight)
            draft.edge(weight, update, size * 4, is_strict=True)
            draft.edge(gradient, update, size)
            draft.live_until(update, len(draft.layouts) + OPS_PER_LAYER)
        previous = gradient
    for weight in parameters.values():
        draft.live_until(weight, len(draft.layouts))


def _leanest(draft: Draft, node: int) -> int:
    return min(draft.usages[node])


def _cheapest(draft: Draft, node: int) -> int:
    return draft.usages[node][int(np.argmin(draft.costs[node]))]


def _peak(draft: Draft, pick: Any) -> int:
    """Largest usage over time when each node uses pick(node)."""
    change = np.zeros(max(stop for _, stop in draft.intervals) + 1, dtype=np.int64)
    for node, (start, stop) in enumerate(draft.intervals):
        used = pick(draft, node)
        change[start] += used
        change[stop] -= used
    return int(np.cumsum(change).max())


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write a synthetic iopddl instance.")
    parser.add_argument("nodes", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--headroom", type=float, default=0.2)
    options = parser.parse_args()
    text = json.dumps(generate(options.nodes, options.seed, options.headroom)).encode()
    options.file.write_bytes(gzip.compress(text, compresslevel=3, mtime=0))


if __name__ == "__main__":
    main()
