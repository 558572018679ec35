"""Decisions taken straight from a cost table, for tests that need no search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autopar.ir.cost import CostNode, CostTable
from autopar.ir.solution import Decisions, StageChoice


def decide(
    table: CostTable,
    pick: Callable[[CostNode], int],
    cuts: Sequence[int] = (),
    *,
    recompute: str = "none",
    schedule: str = "1f1b",
) -> Decisions:
    """One choice per node by `pick`; stages start at block 0 and at each cut."""
    parts: dict[str, dict[str, Any]] = {"op": {}, "hub": {}, "param": {}}
    for node in table.nodes:
        choice = node.choices[pick(node)]
        parts[node.kind].update(dict.fromkeys(node.names, choice))
    starts = [0, *cuts]
    stages = tuple(StageChoice(a, b, recompute) for a, b in zip(starts, [*cuts, table.num_blocks], strict=True))
    return Decisions(
        table.mesh, table.num_microbatches, schedule, stages, parts["op"], parts["hub"], parts["param"]
    )  # fmt: skip


def by_label(*labels: str) -> Callable[[CostNode], int]:
    """Picks, for ops and parameters, the first choice whose first axis has one of the labels, else the first."""

    def pick(node: CostNode) -> int:
        if node.kind == "hub":
            return 0
        found = [i for i, choice in enumerate(node.choices) if choice[0].label in labels]
        return found[0] if found else 0

    return pick


def first_finite(table: CostTable) -> Callable[[CostNode], int]:
    """Picks the first choice of every node (whole everywhere)."""
    assert all(np.isfinite(edge.forward_s[0, 0]) for edge in table.edges)
    return lambda node: 0
