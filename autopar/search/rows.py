"""Linear functionals of the strategies for a fixed layout: objective, stage times and stage memories.

For stages k with full recompute rho_k in {0, 1} and in_flight_k microbatches:

    objective    sum_k A (TIME + rho_k REDO) + beta (ENERGY + rho_k REDO_ENERGY)        (+ A (M - 1) tau)
    time row k   TIME + rho_k REDO  <=  tau
    memory row k STATE + in_flight_k * (ACTIVATION or BOUNDARY) + rho_k * ACTIVATION of block b + WORKSPACE of node i
                 <= memory, one row for every choice of (b, i): their maximum is the stage's memory

TIME, REDO, ENERGY and REDO_ENERGY are those of the stage's type. Shared entries are paid by every stage and never
computed again. Values sent at a stage's start add their price to the node that fixes their placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.ir.cost import Array
from autopar.ir.pipeline import microbatches_in_flight
from autopar.search.cuts import Prices
from autopar.search.evaluate import SHARED, Layout
from autopar.search.problem import (
    ACTIVATION,
    BOUNDARY,
    STATE,
    WORKSPACE,
    Problem,
    Weights,
    pay_channels,
)

WORKSPACES_PER_ROW = 6
"""Memory rows made at a time: one per workspace, so that the next choice cannot just move to the second largest."""


@dataclass(frozen=True)
class LinearRow:
    """weights(choice) - tau_coefficient * tau <= limit."""

    weights: Weights
    limit: float
    tau_coefficient: float = 0.0
    key: tuple[int, ...] = ()


def value_of(problem: Problem, weights: Weights, choice: Sequence[int], totals: Array) -> float:
    """weights(choice); `totals` are `problem.block_totals(choice)`."""
    value = weights.constant + float(np.sum(weights.blocks * totals[: weights.blocks.shape[1]].T))
    for node, vector in weights.nodes.items():
        value += float(vector @ problem.values[: len(vector), problem.offsets[node] + choice[node]])
    return value + sum(float(cost[choice[node]]) for node, cost in weights.extra.items())


def combine(terms: Sequence[tuple[float, Weights]]) -> Weights:
    """Weighted sum of functionals; terms of weight 0 are skipped."""
    used = [(factor, w) for factor, w in terms if factor != 0]
    if not used:
        return Weights(np.zeros_like(terms[0][1].blocks))
    blocks = sum_arrays([factor * w.blocks for factor, w in used])
    nodes: dict[int, Array] = {}
    extra: dict[int, Array] = {}
    for factor, w in used:
        for node, vector in w.nodes.items():
            nodes[node] = nodes.get(node, 0.0) + factor * vector
        for node, cost in w.extra.items():
            extra[node] = extra.get(node, 0.0) + factor * cost
    return Weights(blocks, nodes, extra, sum(factor * w.constant for factor, w in used))


def sum_arrays(arrays: Sequence[Array]) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _stage_weights(problem: Problem, layout: Layout, stage: int, own: Array, shared: Array) -> Weights:
    """Every entry that stage `stage` pays, with channel weights `own` (blocks, foreign parameters) and `shared`."""
    blocks = np.zeros((problem.num_blocks + 1, problem.num_weights))
    start, stop = layout.starts[stage], layout.stop(stage)
    blocks[start:stop] = own
    blocks[SHARED] = shared
    nodes: dict[int, Array] = {}
    for node, home, readers in problem.foreign:
        if not start <= home < stop and any(start <= reader < stop for reader in readers):
            nodes[node] = nodes.get(node, 0.0) + own
    return Weights(blocks, nodes)


def _sends(problem: Problem, layout: Layout, stage: int, time_weight: float, energy_weight: float) -> Weights:
    table, link = problem.table, problem.link(layout.kinds, stage)
    extra: dict[int, Array] = {}
    constant = 0.0
    per_step = table.num_microbatches * table.mesh.num_devices
    start = layout.starts[stage]
    for node, size in problem.sends(start) if stage else ():
        cost = size * (2 * time_weight * link.s_per_byte + 2 * energy_weight * per_step * link.j_per_byte)
        extra[node] = extra.get(node, 0.0) + cost
        constant += 2 * time_weight * link.latency_s
    return Weights(np.zeros((problem.num_blocks + 1, problem.num_weights)), {}, extra, constant)


def _time_vectors(
    problem: Problem, layout: Layout, stage: int, time_weight: float, energy_weight: float
) -> tuple[Array, Array]:
    """Channel weights of a stage's own and shared entries, in the channels of its type."""
    own, shared = np.zeros(problem.num_weights), np.zeros(problem.num_weights)
    seconds, redo_s, joules, redo_j = pay_channels(layout.kinds[stage] if layout.kinds else 0)
    own[seconds] = shared[seconds] = time_weight
    own[joules] = shared[joules] = energy_weight
    if layout.recompute[stage]:
        own[redo_s], own[redo_j] = time_weight, energy_weight
    return own, shared


def stage_cost(problem: Problem, layout: Layout, stage: int, time_weight: float, energy_weight: float) -> Weights:
    """time_weight * t'_k + energy_weight * joules of stage k."""
    own, shared = _time_vectors(problem, layout, stage, time_weight, energy_weight)
    return combine([
        (1.0, _stage_weights(problem, layout, stage, own, shared)),
        (1.0, _sends(problem, layout, stage, time_weight, energy_weight)),
    ])  # fmt: skip


def objective_weights(problem: Problem, layout: Layout, prices: Prices) -> Weights:
    """The additive part of the objective: sum_k A t'_k + beta e_k."""
    return combine([
        (1.0, stage_cost(problem, layout, k, prices.step_weight, prices.beta)) for k in range(layout.num_stages)
    ])  # fmt: skip


def time_rows(problem: Problem, layout: Layout) -> list[LinearRow]:
    """t'_k <= tau."""
    return [LinearRow(stage_cost(problem, layout, k, 1.0, 0.0), 0.0, 1.0, (0, k)) for k in range(layout.num_stages)]


def state_row(problem: Problem, layout: Layout, stage: int, memory_bytes: float) -> LinearRow:
    """The part of stage k's memory that is a sum: state and what the microbatches in flight keep."""
    in_flight = microbatches_in_flight(stage, layout.num_stages, problem.table.num_microbatches, layout.schedule)
    own = np.zeros(problem.num_weights)
    own[STATE] = 1.0
    own[BOUNDARY if layout.recompute[stage] else ACTIVATION] = in_flight
    return LinearRow(_stage_weights(problem, layout, stage, own, own), memory_bytes, 0.0, (1, stage))


def memory_rows(
    problem: Problem, layout: Layout, stage: int, choice: Sequence[int], totals: Array, *, memory_bytes: float
) -> list[LinearRow]:
    """Memory rows of stage k near `choice`: its largest block with each of its largest workspaces, largest first.

    The first is exact at `choice`.
    """
    weights = state_row(problem, layout, stage, memory_bytes).weights
    start, stop = layout.starts[stage], layout.stop(stage)
    block = -1
    if layout.recompute[stage]:
        block = start + int(np.argmax(totals[ACTIVATION, start:stop]))
        weights.blocks[block, ACTIVATION] += 1.0
    return [
        LinearRow(
            Weights(weights.blocks, weights.nodes, {node: problem.node_values(node, WORKSPACE)}),
            memory_bytes,
            0.0,
            (1, stage, block, node),
        )
        for node in _largest_workspaces(problem, weights, start, stop, choice)
    ]


def _largest_workspaces(problem: Problem, weights: Weights, start: int, stop: int, choice: Sequence[int]) -> list[int]:
    present = problem.node_count[:, start:stop].any(axis=1) | (problem.node_count[:, SHARED] > 0)
    present[list(weights.nodes)] = True
    chosen = problem.values[WORKSPACE, problem.offsets[:-1] + np.asarray(choice, dtype=np.int64)]
    order = np.argsort(np.where(present, -chosen, np.inf), kind="stable")[:WORKSPACES_PER_ROW]
    return [int(node) for node in order if present[node]]
