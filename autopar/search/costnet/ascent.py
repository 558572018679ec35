"""Multipliers of the liveness rows, raised along the usage above the limits while messages are sent on.

A step of Polyak's length, theta (target - bound) / |g|^2, goes along g = usage - limit, where usage is that of the
strategies near the least of their nodes. After some sweeps without gain theta shrinks and the best state returns.
Every bound on the way is valid, so a bad step costs time only.
"""

from __future__ import annotations

import time

import numpy as np

from autopar.ir.cost import Array
from autopar.search.costnet.dual import Chains

PATIENCE = 4
SHRINK = 0.6
WINDOW = 15
"""Sweeps over which the gain is measured that decides to go on."""
SOFTNESS = 0.05
"""Temperature of the usage, as a share of the gap per node."""


def climb(
    chains: Chains,
    target: float,
    *,
    theta: float = 0.02,
    least_sweeps: int = WINDOW,
    most_sweeps: int = 300,
    least_gain: float = 0.01,
    deadline: float = np.inf,
) -> float:
    """Raise the bound towards `target`; leaves the best state in `chains` and returns its bound.

    Stops when `WINDOW` sweeps gain less than `least_gain` of the gap, at the target, or at `deadline` (perf_counter).
    """
    best, saved = -np.inf, (chains.messages.copy(), chains.multipliers.copy())
    idle, history = 0, []
    for count in range(most_sweeps):
        bound = chains.sweep()
        if bound > best:
            best, idle, saved = bound, 0, (chains.messages.copy(), chains.multipliers.copy())
        else:
            idle += 1
        history.append(best)
        if best >= target or time.perf_counter() > deadline:
            break
        if count >= max(least_sweeps, WINDOW) and best - history[-WINDOW] < least_gain * (target - best):
            break
        if idle >= PATIENCE:
            theta, idle = theta * SHRINK, 0
            chains.messages, chains.multipliers = saved[0].copy(), saved[1].copy()
            chains.sweep()
        _step(chains, theta * max(target - bound, 1.0), SOFTNESS * (target - best) / max(len(chains.sizes), 1))
    chains.messages, chains.multipliers = saved
    chains.bound = best
    return best


def _step(chains: Chains, length: float, temperature: float) -> None:
    if not len(chains.limits):
        return
    excess = chains.usage(chains.weights(max(temperature, 1e-3))) - chains.limits
    direction: Array = np.where((excess > 0) | (chains.multipliers > 0), excess, 0.0)
    norm = float(direction @ direction)
    if norm > 0:
        chains.multipliers = np.maximum(0.0, chains.multipliers + length / norm * direction)
