"""Redistribution: which collectives turn one sharding into another on the same mesh, forward and backward.

One step changes the placement on one axis. Its backward is fixed by the placement's gradient dual
(`ir.placement`), so forward and backward are listed together:

| step       | forward         | backward        | bytes moved are those of ...                       |
|------------|-----------------|-----------------|----------------------------------------------------|
| `I -> R`   | nothing         | all_reduce      | the local value                                    |
| `I -> Sd`  | slice           | all_gather      | the local value before the slice                   |
| `I -> P`   | zero but rank 0 | nothing         |                                                    |
| `R -> I`   | nothing         | zero but rank 0 |                                                    |
| `R -> Sd`  | slice           | zero padding    |                                                    |
| `R -> P`   | zero but rank 0 | zero but rank 0 |                                                    |
| `Sd -> I`  | all_gather      | slice           | the gathered value                                 |
| `Sd -> R`  | all_gather      | reduce_scatter  | the gathered value                                 |
| `Sd -> Se` | all_to_all      | all_to_all      | the local value                                    |
| `P -> I`   | all_reduce      | nothing         | the local value                                    |
| `P -> R`   | all_reduce      | all_reduce      | the local value                                    |
| `P -> Sd`  | reduce_scatter  | all_gather      | the local value before the scatter                 |

`Sd -> P` is never needed by a rule and is not a step. When two axes shard one tensor dim, the outer
axis splits first, so only the innermost of them may be undone or changed, and a new split may only be added inside.
A change on several axes is a shortest sequence of steps under a fixed price order (see `STEP_RANK`).

For a value without gradient `I` and `R` are the same, and backward costs nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from autopar.ir.placement import INVARIANT, REPLICATE, Placement, Sharding, shard

FORWARD = {
    "IR": "none", "IS": "slice", "IP": "mask", "RI": "none", "RS": "slice", "RP": "mask",
    "SI": "all_gather", "SR": "all_gather", "SS": "all_to_all",
    "PI": "all_reduce", "PR": "all_reduce", "PS": "reduce_scatter",
}  # fmt: skip
BACKWARD = {
    "IR": "all_reduce", "IS": "all_gather", "IP": "none", "RI": "mask", "RS": "pad", "RP": "mask",
    "SI": "slice", "SR": "reduce_scatter", "SS": "all_to_all",
    "PI": "none", "PR": "all_reduce", "PS": "all_gather",
}  # fmt: skip
STEP_RANK = {"none": 0.0, "slice": 0.01, "mask": 0.02, "pad": 0.02, "all_to_all": 1.0, "all_gather": 2.0}
STEP_RANK |= {"reduce_scatter": 2.0, "all_reduce": 4.0}
"""Relative price of a collective, used only to choose between sequences; real prices come from the cost model."""


@dataclass(frozen=True, slots=True)
class RedistributeStep:
    """One row of the module's table on one mesh axis; `source` and `target` are the placements on that axis."""

    axis: int
    source: Placement
    target: Placement

    @property
    def kinds(self) -> str:
        return self.source.kind + self.target.kind

    @property
    def forward(self) -> str:
        return FORWARD[self.kinds]

    @property
    def backward(self) -> str:
        return BACKWARD[self.kinds]


def is_free(step: RedistributeStep) -> bool:
    """No data moves between ranks in forward or backward."""
    return STEP_RANK[step.forward] < 1 and STEP_RANK[step.backward] < 1


@lru_cache(maxsize=65536)
def redistribute_steps(
    source: Sharding, target: Sharding, axis_sizes: tuple[int, ...], requires_grad: bool
) -> tuple[RedistributeStep, ...] | None:
    """Cheapest sequence of steps, or None where there is none (e.g. `S0 -> P`).

    Args:
        source: placements by axis, same length as `axis_sizes`.
        target: likewise.
        axis_sizes: size of every axis; on an axis of size 1 all placements are equal.
        requires_grad: whether a gradient flows back.
    """
    source, target = (_normal(s, axis_sizes, requires_grad) for s in (source, target))
    queue: list[tuple[float, int, Sharding, tuple[RedistributeStep, ...]]] = [(0.0, 0, source, ())]
    settled: set[Sharding] = set()
    pushed = 0
    while queue:
        price, _, state, steps = heapq.heappop(queue)
        if state == target:
            return steps
        if state in settled:
            continue
        settled.add(state)
        for step, successor in _successors(state, target, axis_sizes):
            pushed += 1
            cost = STEP_RANK[step.forward] + (STEP_RANK[step.backward] if requires_grad else 0.0) + 1e-4
            heapq.heappush(queue, (price + cost, pushed, successor, (*steps, step)))
    return None


def _normal(sharding: Sharding, axis_sizes: tuple[int, ...], requires_grad: bool) -> Sharding:
    """Canonical form: `I` on axes of size 1, and for values without gradient `I` instead of `R`."""
    return tuple(
        INVARIANT if size == 1 or (p == REPLICATE and not requires_grad) else p
        for p, size in zip(sharding, axis_sizes, strict=True)
    )


def _successors(
    state: Sharding, target: Sharding, axis_sizes: tuple[int, ...]
) -> Iterator[tuple[RedistributeStep, Sharding]]:
    """States one step away: on each axis the target's placement there, or the whole value."""
    for axis, current in enumerate(state):
        if axis_sizes[axis] == 1 or (current.is_shard and _is_split_inside(state, axis, current.dim)):
            continue
        for new in sorted({INVARIANT, REPLICATE, target[axis]}):
            allowed = new != current and current.kind + new.kind in FORWARD
            if not allowed or (new.is_shard and _is_split_inside(state, axis, new.dim)):
                continue
            yield RedistributeStep(axis, current, new), (*state[:axis], new, *state[axis + 1 :])


def _is_split_inside(state: Sharding, axis: int, dim: int) -> bool:
    return shard(dim) in state[axis + 1 :]
