"""Relaxations of a skeleton: bounds that hold for every cut of K stages.

With c(p) = sum over all blocks of A t'_b + beta e_b (shared entries K times) and tau >= average and >= bottleneck:

    spread      A (1 + (M-1)/K) sum_b t'_b + beta sum_b e_b
    bottleneck  c(p) + A (M-1) tau*,   tau* = best contiguous partition of the per-block minima of t'_b
    memory      sum_b state_b + in_flight_b kept_b + K shared  <=  K memory     (with a multiplier)

plus the K - 1 cheapest sends. `in_flight_b` is the least number of microbatches that block b's stage keeps: the stage
is at most the b-th, and blocks after b fill whole stages whose minima stay below the largest tau that can still win.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autopar.ir.cost import Array
from autopar.ir.pipeline import holds_all
from autopar.search.bounds import LayoutBound
from autopar.search.cuts import Prices
from autopar.search.problem import (
    ACTIVATION,
    BOUNDARY,
    ENERGY,
    LEAST_KEPT,
    NUM_WEIGHTS,
    REDO,
    REDO_ENERGY,
    STATE,
    TIME,
    Problem,
    Weights,
)
from autopar.search.rows import LinearRow


@dataclass(frozen=True)
class Relaxation:
    """What the bounds need to know of a skeleton. `mode` as in `space`; `memory_bytes` of one device."""

    problem: Problem
    num_stages: int
    mode: str
    schedule: str
    prices: Prices
    memory_bytes: float

    @property
    def slope(self) -> float:
        """A (M - 1): price of the bottleneck."""
        return self.prices.step_weight * (self.problem.table.num_microbatches - 1)


def spread_weights(relax: Relaxation) -> Weights:
    """The `spread` bound of the module docstring."""
    factor = 1 + (relax.problem.table.num_microbatches - 1) / relax.num_stages
    return _uniform(relax, relax.prices.step_weight * factor)


def additive_weights(relax: Relaxation) -> Weights:
    """c(p) of the module docstring."""
    return _uniform(relax, relax.prices.step_weight)


def _uniform(relax: Relaxation, time_weight: float) -> Weights:
    blocks = np.zeros((relax.problem.num_blocks + 1, NUM_WEIGHTS))
    blocks[:, TIME], blocks[:, ENERGY] = time_weight, relax.prices.beta
    if relax.mode == "full":
        blocks[:-1, REDO], blocks[:-1, REDO_ENERGY] = time_weight, relax.prices.beta
    blocks[-1] *= relax.num_stages
    return Weights(blocks, constant=cheapest_sends(relax, time_weight))


def cheapest_sends(relax: Relaxation, time_weight: float) -> float:
    """Sum of the K - 1 cheapest boundaries, each value in its smallest form."""
    problem, table = relax.problem, relax.problem.table
    per_step = table.num_microbatches * table.mesh.num_devices
    prices = np.zeros(problem.num_blocks)
    for crossing in table.crossings:
        size = float(np.min(crossing.bytes_by_choice[problem.kept[crossing.node]]))
        price = time_weight * (table.p2p_latency_s + size * table.p2p_s_per_byte)
        price += relax.prices.beta * per_step * size * table.p2p_j_per_byte
        prices[crossing.producer_block + 1 : crossing.last_block + 1] += 2 * price
    return float(np.sum(np.sort(prices[1:])[: relax.num_stages - 1]))


def surely_in_flight(relax: Relaxation) -> Array:
    """Microbatches kept per block at least, whatever the question: the stage of block b is at most the b-th."""
    count, num_blocks = relax.problem.table.num_microbatches, relax.problem.num_blocks
    if holds_all(relax.schedule, relax.num_stages, count):
        return np.full(num_blocks, float(count))
    return np.minimum(np.maximum(relax.num_stages - np.arange(num_blocks), 1.0), count)


def least_in_flight(relax: Relaxation, minima: Array, largest_tau: float) -> Array | None:
    """Least microbatches kept per block; None if no partition into K stages stays below `largest_tau`."""
    count, num_blocks = relax.problem.table.num_microbatches, relax.problem.num_blocks
    if holds_all(relax.schedule, relax.num_stages, count):
        return np.full(num_blocks, float(count))
    from_end = np.ones(num_blocks)
    position, filled = 1, float(minima[-1])
    limit = largest_tau * (1 + 1e-9)
    for block in range(num_blocks - 1, -1, -1):
        if filled + minima[block] > limit:
            position, filled = position + 1, float(minima[-1])
            if filled + minima[block] > limit:
                return None
        filled += float(minima[block])
        from_end[block] = max(position, relax.num_stages - block)
    return np.minimum(from_end, count) if position <= relax.num_stages else None


def memory_relaxation(relax: Relaxation, base: Weights, in_flight: Array) -> LayoutBound:
    """`base` under the aggregated memory row of the module docstring."""
    kept = {"none": ACTIVATION, "full": BOUNDARY, "mixed": LEAST_KEPT}[relax.mode]
    blocks = np.zeros((relax.problem.num_blocks + 1, NUM_WEIGHTS))
    blocks[:-1, STATE] = 1.0
    blocks[:-1, kept] = in_flight
    blocks[-1, STATE] = relax.num_stages
    blocks[-1, kept] = relax.num_stages
    row = LinearRow(Weights(blocks), relax.num_stages * relax.memory_bytes)
    return LayoutBound(relax.problem, None, base, 0.0, relax.memory_bytes, [row])


def largest_useful_tau(relax: Relaxation, additive_bound: float, cutoff: float) -> float:
    """Largest bottleneck that a plan below `cutoff` can have."""
    return (cutoff - additive_bound) / relax.slope if relax.slope > 0 and math.isfinite(cutoff) else math.inf
