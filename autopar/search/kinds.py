"""Kinds: bounds of skeletons whose stages lie on several types of device.

With t_k the loaded seconds of stage k, for any shares s_k >= 0 that sum to 1,

    sum_k t_k + (M - 1) max_k t_k   >=   sum_k (1 + (M - 1) s_k) t_k

so every type may have its own weight of time, slow types a smaller one. An entry of a block is paid on one type:

    A T + beta D   >=   sum of own entries of min over types c of (w_c t_c + beta e_c)
                        + sum of shared entries and stages k of (w_k t_k + beta e_k)

a pairwise network like any other. Weights in proportion to the speed of the types make it tight where stages can be
balanced; it knows nothing of how many stages a type has beyond that (`optimist` does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autopar.ir.cost import Array
from autopar.ir.mixed import MixedSource
from autopar.search.cuts import Prices
from autopar.search.problem import (
    NUM_CHANNELS,
    NUM_EDGE_CHANNELS,
    NUM_WEIGHTS,
    REDO,
    STATE,
    TIME,
    WORKSPACE,
    Problem,
    Weights,
    pay_channels,
)
from autopar.search.space import IdealBound, Skeleton

OWN, SHARED_PAY = TIME, REDO
"""Channels of a priced problem: what own entries pay, and what shared ones pay in all stages together."""


def time_weights(skeleton: Skeleton, speeds: Sequence[float], step_weight: float) -> dict[int, float]:
    """w_c of the module docstring for every type used: at least A, in proportion to speed above that."""
    count = {kind: skeleton.kinds.count(kind) for kind in sorted(set(skeleton.kinds))}
    left, free = float(skeleton.num_stages + skeleton.num_microbatches - 1), dict(count)
    weights = dict.fromkeys(count, 1.0)
    while free:
        scale = left / sum(number * speeds[kind] for kind, number in free.items())
        slow = [kind for kind in free if scale * speeds[kind] < 1]
        if not slow:
            weights |= {kind: scale * speeds[kind] for kind in free}
            break
        for kind in slow:
            left -= free.pop(kind)
    return {kind: step_weight * weight for kind, weight in weights.items()}


def price_kinds(
    problem: Problem, kinds: Sequence[int], weights: Mapping[int, float], beta: float, *, redo: bool
) -> tuple[Problem, Weights]:
    """The network of the module docstring.

    Args:
        problem: of all types.
        kinds: of the stages.
        weights: w_c of every type among them.
        beta: per joule.
        redo: own entries compute forward again.
    """
    nodes = _pays([problem.values[list(pay_channels(kind))] for kind in weights], kinds, weights, beta, redo=redo)
    each = NUM_EDGE_CHANNELS
    edge_parts = [problem.edge_values[each * kind : each * (kind + 1)] for kind in weights]
    values = np.zeros((NUM_CHANNELS, problem.values.shape[1]))
    values[STATE : WORKSPACE + 1] = problem.values[STATE : WORKSPACE + 1]
    values[[OWN, SHARED_PAY]] = nodes
    edges = np.zeros((each, problem.edge_values.shape[1]))
    edges[[OWN, SHARED_PAY]] = _pays(edge_parts, kinds, weights, beta, redo=redo)
    blocks = np.zeros((problem.num_blocks + 1, NUM_WEIGHTS))
    blocks[:-1, OWN] = blocks[-1, SHARED_PAY] = 1.0
    priced = replace(problem, values=values, edge_values=edges, cache={}, parts=(), links={})
    return priced, Weights(blocks)


def _pays(
    parts: Sequence[Array], kinds: Sequence[int], weights: Mapping[int, float], beta: float, *, redo: bool
) -> Array:
    """[OWN and SHARED_PAY, entry] from TIME, REDO, ENERGY and REDO_ENERGY of each type in `weights`."""
    once = [weight * part[0] + beta * part[2] for part, weight in zip(parts, weights.values(), strict=True)]
    again = [weight * part[1] + beta * part[3] for part, weight in zip(parts, weights.values(), strict=True)]
    own = [a + b for a, b in zip(once, again, strict=True)] if redo else once
    shared = sum(kinds.count(kind) * pay for kind, pay in zip(weights, once, strict=True))
    return np.array([np.minimum.reduce(own), shared])


class MixedIdeal(IdealBound):
    """`IdealBound` of a mixed cluster: from one device of each type. Whether the state fits depends on no type."""

    def __init__(self, source: MixedSource) -> None:
        super().__init__(source)
        self._speeds = source.speeds
        self._each = tuple(IdealBound(part) for part in source.parts)
        self._spreads: dict[tuple[object, ...], float] = {}

    def spread(self, skeleton: Skeleton, prices: Prices) -> float:
        """The bound of the module docstring for perfect splits."""
        key = (replace(skeleton, mode="none"), prices)
        if key not in self._spreads:
            self._spreads[key] = self._spread(skeleton, prices)
        return self._spreads[key]

    def _spread(self, skeleton: Skeleton, prices: Prices) -> float:
        weights = time_weights(skeleton, self._speeds, prices.step_weight)
        pays, shared = [], 0.0
        own_count = np.zeros(0)
        for kind, weight in weights.items():
            found = self._each[kind].node_figures(skeleton)
            if found is None:
                return math.inf
            seconds, joules, count = found
            pays.append(weight * seconds + prices.beta * joules)
            own_count = count[:, :-1].sum(axis=1)
            shared += skeleton.kinds.count(kind) * float(pays[-1] @ count[:, -1])
        return float(np.minimum.reduce(pays) @ own_count) + shared
