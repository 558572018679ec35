"""Cuts: the best stages of given shardings, by an exact dynamic programme over block intervals.

For one choice of strategies every interval [i, j) of blocks has, with and without recompute, a loaded time
t' = t + g / M, an energy e and a memory that depends on its position h counted from the end (it keeps min(h, M)
microbatches under 1F1B). For a bound tau on the loaded time of every stage

    f_1[i] = cost(i, B)          f_h[i] = min over j > i, recompute of cost(i, j) + f_{h-1}[j]
    cost   = A t' + beta e  if t' <= tau and memory fits, else inf

and the answer is min over tau of f_K[0] + A (M - 1) tau, with tau running over the interval times from the least
feasible one up, until f_K[0] at tau = inf plus A (M - 1) tau cannot win any more. On a mixed cluster the position h
decides the type of the stage, and with it times, energies and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array, Link
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
    """What the cuts must respect.

    Attributes:
        recompute: allowed values, e.g. (False, True).
        memory: bytes of one device, per stage.
        kinds: types of the stages on a mixed cluster, else ().
    """

    num_stages: int
    schedule: str
    recompute: tuple[bool, ...]
    memory: tuple[float, ...]
    kinds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Intervals:
    """[recompute, start, stop] arrays; `fixed` and `kept` are bytes; `fixed` is inf where start >= stop."""

    time: Array
    energy: Array
    fixed: Array
    kept: Array


def best_cuts(problem: Problem, choice: Sequence[int], rules: CutRules, prices: Prices) -> tuple[float, Layout] | None:
    """Objective value and stages, or None where no cuts fit into memory."""
    intervals = intervals_by_position(problem, choice, rules)
    num_microbatches = problem.table.num_microbatches
    costs = {id(own): prices.step_weight * own.time + prices.beta * own.energy for own in intervals}
    by_position = []
    for own, memory, limit in zip(
        intervals, memory_by_position(intervals, rules, num_microbatches), reversed(rules.memory), strict=True
    ):
        fits = (memory <= limit * (1 + MEMORY_TOLERANCE)) & np.isfinite(memory)
        by_position.append(np.where(fits, costs[id(own)], np.inf))
    slope = prices.step_weight * (num_microbatches - 1)
    value, path = scan_tau(by_position, [own.time for own in intervals], slope)
    if not path:
        return None
    starts, redo = tuple(start for start, _ in path), tuple(rules.recompute[r] for _, r in path)
    return value, Layout(problem.num_blocks, starts, redo, rules.schedule, rules.kinds)


def intervals_by_position(problem: Problem, choice: Sequence[int], rules: CutRules) -> list[Intervals]:
    """Figures of all intervals as the h-th stage from the end, h = 1..K; equal positions share theirs."""
    if not rules.kinds:
        return [interval_figures(problem, choice, rules.recompute, problem.table.link)] * rules.num_stages
    made: dict[tuple[int, Link], Intervals] = {}
    found = []
    for stage in reversed(range(rules.num_stages)):
        key = rules.kinds[stage], problem.link(rules.kinds, stage)
        if key not in made:
            made[key] = interval_figures(problem.parts[key[0]], choice, rules.recompute, key[1])
        found.append(made[key])
    return found


def memory_by_position(intervals: Sequence[Intervals], rules: CutRules, num_microbatches: int) -> list[Array]:
    """Bytes [recompute, start, stop] of an interval as the h-th stage from the end, h = 1..K."""
    return [
        own.fixed
        + own.kept * microbatches_in_flight(rules.num_stages - h, rules.num_stages, num_microbatches, rules.schedule)
        for h, own in enumerate(intervals, start=1)
    ]


_Path = list[tuple[int, int]]


def scan_tau(by_position: list[Array], times: Sequence[Array], slope: float) -> tuple[float, _Path]:
    """Min over tau of f_K[0] + slope * tau, and the path; (inf, []) if nothing fits.

    `times` are those of the positions, as the costs; positions may share an array.
    """
    free = chain(by_position)
    if not free[1]:
        return free

    def bottleneck(path: _Path) -> float:
        stops = [start for start, _ in path[1:]] + [times[0].shape[2] - 1]
        along = zip(reversed(times), path, stops, strict=True)
        return max(float(time[r, i, j]) for time, (i, r), j in along)

    best, best_path = free[0] + slope * bottleneck(free[1]), free[1]
    if slope == 0:
        return best, best_path
    taus = np.unique(np.concatenate([time[usable] for time, usable in _usable(by_position, times)]))
    taus = taus[np.append(np.diff(taus) > TAU_TOLERANCE * taus[1:], True)]
    low, high = 0, int(np.searchsorted(taus, bottleneck(free[1])))
    while low < high:
        middle = (low + high) // 2
        if math.isfinite(_limited(by_position, times, taus[middle])[0]):
            high = middle
        else:
            low = middle + 1
    for tau in taus[low:]:
        if free[0] + slope * tau >= best:
            break
        value, path = _limited(by_position, times, tau)
        if path and value + slope * bottleneck(path) < best:
            best, best_path = value + slope * bottleneck(path), path
    return best, best_path


def _usable(by_position: list[Array], times: Sequence[Array]) -> list[tuple[Array, NDArray[np.bool_]]]:
    """Every distinct array of times, and where some position of it has a finite cost."""
    found: dict[int, tuple[Array, NDArray[np.bool_]]] = {}
    for time, cost in zip(times, by_position, strict=True):
        finite = np.isfinite(cost)
        found[id(time)] = (time, finite | found[id(time)][1] if id(time) in found else finite)
    return list(found.values())


def _limited(by_position: list[Array], times: Sequence[Array], tau: float) -> tuple[float, _Path]:
    limit = tau * (1 + TAU_TOLERANCE)
    slow = {key: time > limit for key, time in {id(time): time for time in times}.items()}
    return chain([np.where(slow[id(time)], np.inf, cost) for time, cost in zip(times, by_position, strict=True)])


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


def interval_figures(problem: Problem, choice: Sequence[int], recompute: Sequence[bool], link: Link) -> Intervals:
    """Figures of every interval on the devices of `problem`, with `link` from the stage before."""
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
    sizes = [c.bytes_by_choice[problem.kept[c.node][choice[c.node]]] for c in problem.table.crossings]
    seconds, joules = send_costs(problem, sizes, link)
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


def send_costs(problem: Problem, sizes: Sequence[float], link: Link) -> tuple[Array, Array]:
    """Seconds of one microbatch and joules of one step (all devices) for a stage that starts at each block.

    `sizes` are the bytes of every crossing.
    """
    table = problem.table
    seconds, joules = np.zeros(problem.num_blocks), np.zeros(problem.num_blocks)
    per_step = table.num_microbatches * table.mesh.num_devices
    for crossing, size in zip(table.crossings, sizes, strict=True):
        span = slice(crossing.producer_block + 1, crossing.last_block + 1)
        seconds[span] += 2 * (link.latency_s + float(size) * link.s_per_byte)
        joules[span] += 2 * float(size) * link.j_per_byte * per_step
    return seconds, joules
