"""Cuts: the best stages of given shardings, by an exact dynamic programme over block intervals.

For one choice of strategies every interval [i, j) of blocks has, with and without recompute, a loaded time
t' = t + g / M, an energy e and a memory that depends on its position h counted from the end (it keeps min(h, M)
microbatches under 1F1B). For a bound tau on the loaded time of every stage

    f_1[i] = cost(i, B)          f_h[i] = min over j > i, recompute of cost(i, j) + f_{h-1}[j]
    cost   = A t' + beta e  if t' <= tau and memory fits, else inf

and the answer is min over tau of f_K[0] + A (M - 1) tau, with tau running over the interval times from the least
feasible one up, until f_K[0] at tau = inf plus A (M - 1) tau cannot win any more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.ir.cost import Array
from autopar.ir.pipeline import microbatches_in_flight
from autopar.search.evaluate import MEMORY_TOLERANCE, Layout
from autopar.search.problem import (
    ACTIVATION,
    BOUNDARY,
    ENERGY,
    NUM_CHANNELS,
    REDO,
    REDO_ENERGY,
    STATE,
    TIME,
    WORKSPACE,
    Problem,
)

TAU_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Prices:
    """Weighted objective for a number of devices: alpha T + beta E = step_weight * T + beta * dynamic energy."""

    step_weight: float
    beta: float


@dataclass(frozen=True)
class CutRules:
    """What the cuts must respect. `recompute`: allowed values, e.g. (False, True)."""

    num_stages: int
    schedule: str
    recompute: tuple[bool, ...]
    memory_bytes: float


@dataclass(frozen=True)
class Intervals:
    """[recompute, start, stop] arrays; `fixed` and `kept` are bytes; `fixed` is inf where start >= stop."""

    time: Array
    energy: Array
    fixed: Array
    kept: Array


def best_cuts(problem: Problem, choice: Sequence[int], rules: CutRules, prices: Prices) -> tuple[float, Layout] | None:
    """Objective value and stages, or None where no cuts fit into memory."""
    intervals = interval_figures(problem, choice, rules.recompute)
    num_microbatches = problem.table.num_microbatches
    cost = prices.step_weight * intervals.time + prices.beta * intervals.energy
    limit = rules.memory_bytes * (1 + MEMORY_TOLERANCE)
    by_position = [
        np.where((memory <= limit) & np.isfinite(memory), cost, np.inf)
        for memory in memory_by_position(intervals, rules, num_microbatches)
    ]
    slope = prices.step_weight * (num_microbatches - 1)
    value, path = scan_tau(by_position, intervals.time, slope)
    if not path:
        return None
    starts = tuple(start for start, _ in path)
    return value, Layout(problem.num_blocks, starts, tuple(rules.recompute[r] for _, r in path), rules.schedule)


def memory_by_position(intervals: Intervals, rules: CutRules, num_microbatches: int) -> list[Array]:
    """Bytes [recompute, start, stop] of an interval as the h-th stage from the end, h = 1..K."""
    return [
        intervals.fixed
        + intervals.kept
        * microbatches_in_flight(rules.num_stages - h, rules.num_stages, num_microbatches, rules.schedule)
        for h in range(1, rules.num_stages + 1)
    ]


_Path = list[tuple[int, int]]


def scan_tau(by_position: list[Array], time: Array, slope: float) -> tuple[float, _Path]:
    """Min over tau of f_K[0] + slope * tau, and the path; (inf, []) if nothing fits."""
    free = chain(by_position)
    if not free[1]:
        return free

    def bottleneck(path: _Path) -> float:
        stops = [start for start, _ in path[1:]] + [time.shape[2] - 1]
        return max(float(time[r, i, j]) for (i, r), j in zip(path, stops, strict=True))

    best, best_path = free[0] + slope * bottleneck(free[1]), free[1]
    if slope == 0:
        return best, best_path
    usable = np.any(np.isfinite(np.array(by_position)), axis=0)
    taus = np.unique(time[usable])
    taus = taus[np.append(np.diff(taus) > TAU_TOLERANCE * taus[1:], True)]
    low, high = 0, int(np.searchsorted(taus, bottleneck(free[1])))
    while low < high:
        middle = (low + high) // 2
        if math.isfinite(_limited(by_position, time, taus[middle])[0]):
            high = middle
        else:
            low = middle + 1
    for tau in taus[low:]:
        if free[0] + slope * tau >= best:
            break
        value, path = _limited(by_position, time, tau)
        if path and value + slope * bottleneck(path) < best:
            best, best_path = value + slope * bottleneck(path), path
    return best, best_path


def _limited(by_position: list[Array], time: Array, tau: float) -> tuple[float, _Path]:
    slow = time > tau * (1 + TAU_TOLERANCE)
    return chain([np.where(slow, np.inf, cost) for cost in by_position])


def chain(by_position: list[Array], *, largest: bool = False) -> tuple[float, _Path]:
    """f_K[0] and the path as (start, recompute index) per stage; by_position[h - 1] is [recompute, start, stop].

    With `largest`, stages combine by maximum instead of sum.
    """
    num_blocks = by_position[0].shape[1]
    rest = np.full(num_blocks + 1, np.inf)
    rest[num_blocks] = 0.0
    decisions = []
    for cost in by_position:
        total = np.maximum(cost, rest) if largest else cost + rest
        flat = total.transpose(1, 0, 2).reshape(num_blocks, -1)
        pick = flat.argmin(axis=1)
        decisions.append(pick)
        rest = np.append(flat[np.arange(num_blocks), pick], np.inf)
    if not math.isfinite(rest[0]):
        return math.inf, []
    path, start = [], 0
    for pick in reversed(decisions):
        redo, stop = divmod(int(pick[start]), num_blocks + 1)
        path.append((start, redo))
        start = stop
    return float(rest[0]), path


def interval_figures(problem: Problem, choice: Sequence[int], recompute: Sequence[bool]) -> Intervals:
    num_blocks = problem.num_blocks
    totals = problem.block_totals(choice)
    prefix = np.concatenate([np.zeros((NUM_CHANNELS, 1)), np.cumsum(totals[:, :num_blocks], axis=1)], axis=1)
    sums = prefix[:, None, :] - prefix[:, :-1, None] + totals[:, num_blocks, None, None]
    shared_redo = totals[(REDO, REDO_ENERGY), num_blocks]
    sums[REDO] -= shared_redo[0]
    sums[REDO_ENERGY] -= shared_redo[1]
    workspace = running_max(totals[WORKSPACE, :num_blocks], float(totals[WORKSPACE, num_blocks]))
    block_activations = totals[ACTIVATION, :num_blocks]
    largest_block = running_max(block_activations, 0.0)
    _add_foreign(problem, choice, sums, workspace)
    seconds, joules = send_costs(problem, choice)
    time = np.array([sums[TIME] + (sums[REDO] if r else 0.0) + seconds[:, None] for r in recompute])
    energy = np.array([sums[ENERGY] + (sums[REDO_ENERGY] if r else 0.0) + joules[:, None] for r in recompute])
    kept = np.array([sums[BOUNDARY] if r else sums[ACTIVATION] for r in recompute])
    fixed = np.array([sums[STATE] + workspace + (largest_block if r else 0.0) for r in recompute])
    empty = np.arange(num_blocks + 1)[None, :] <= np.arange(num_blocks)[:, None]
    fixed[:, empty] = np.inf
    return Intervals(time, energy, fixed, kept)


def running_max(per_block: Array, least: float) -> Array:
    """[start, stop] maximum over blocks start..stop-1, at least `least`."""
    num_blocks = len(per_block)
    result = np.full((num_blocks, num_blocks + 1), least)
    for start in range(num_blocks):
        result[start, start + 1 :] = np.maximum(np.maximum.accumulate(per_block[start:]), least)
    return result


def _add_foreign(problem: Problem, choice: Sequence[int], sums: Array, workspace: Array) -> None:
    """Parameters whose home block lies outside an interval that reads them (see `evaluate.foreign_reads`)."""
    num_blocks = problem.num_blocks
    starts, stops = np.arange(num_blocks)[:, None], np.arange(num_blocks + 1)[None, :]
    for node, home, readers in problem.foreign:
        reads = np.zeros((num_blocks, num_blocks + 1), dtype=bool)
        for reader in readers:
            reads |= (starts <= reader) & (reader < stops)
        pays = reads & ~((starts <= home) & (home < stops))
        values = problem.values[:, problem.offsets[node] + choice[node]]
        sums[:, pays] += values[:, None]
        workspace[pays] = np.maximum(workspace[pays], values[WORKSPACE])


def send_costs(problem: Problem, choice: Sequence[int]) -> tuple[Array, Array]:
    """Seconds of one microbatch and joules of one step (all devices) for a stage that starts at each block."""
    table = problem.table
    seconds, joules = np.zeros(problem.num_blocks), np.zeros(problem.num_blocks)
    per_step = table.num_microbatches * table.mesh.num_devices
    for crossing in table.crossings:
        size = float(crossing.bytes_by_choice[problem.kept[crossing.node][choice[crossing.node]]])
        span = slice(crossing.producer_block + 1, crossing.last_block + 1)
        seconds[span] += 2 * (table.p2p_latency_s + size * table.p2p_s_per_byte)
        joules[span] += 2 * size * table.p2p_j_per_byte * per_step
    return seconds, joules
