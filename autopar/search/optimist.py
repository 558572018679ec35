"""Optimist: bounds of layouts from blocks that each choose their strategies alone.

A block by itself is a small problem: its nodes, the edges it pays and their far ends, free. The minimum of any
channel weighting over it bounds what the block adds to a stage in every plan. With these minima in place of the
figures of one choice, the cut programme (`cuts`) gives a bound over all layouts, and a depth-first walk lists the
layouts that can still win, each with its own bound.

Memory minima are taken at 1 and at K microbatches in flight and joined by a line: the minimum of state + h * kept is
concave in h, so the line lies below it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array, CostTable, Link
from autopar.ir.pipeline import microbatches_in_flight
from autopar.search.cuts import CutRules, Prices, running_max, scan_tau, send_costs
from autopar.search.evaluate import MEMORY_TOLERANCE, SHARED, Layout
from autopar.search.problem import (
    ACTIVATION,
    BOUNDARY,
    ENERGY,
    NUM_WEIGHTS,
    REDO,
    REDO_ENERGY,
    STATE,
    TIME,
    WORKSPACE,
    Problem,
    Weights,
    make_problem,
)

MOST_STEPS = 3_000
"""Partial layouts that are looked at per skeleton."""


@dataclass
class Blocks:
    """Blocks of a problem one by one; equal blocks share their work. Minima are remembered by weighting."""

    problem: Problem
    parts: dict[object, Problem | None] = field(default_factory=dict)
    known: dict[bytes, Array] = field(default_factory=dict)

    def minima(self, own: Array, shared: Array) -> Array:
        """[num_blocks + 1]: least `own` weighting of every block, last least `shared` weighting of shared entries."""
        key = own.tobytes() + shared.tobytes()
        if key not in self.known:
            num_blocks = self.problem.num_blocks
            found = [self._least(block, own) for block in range(num_blocks)]
            self.known[key] = np.array([*found, self._least(SHARED, shared)])
        return self.known[key]

    def _least(self, block: int, vector: Array) -> float:
        nodes, edges = self.problem.node_count[:, block], self.problem.edge_count[:, block]
        if not nodes.any() and not edges.any():
            return 0.0
        key = self.key(block)
        if key not in self.parts:
            self.parts[key] = make_problem(block_table(self.problem.table, block))
        part = self.parts[key]
        return part.solve(Weights(np.array([vector, np.zeros(NUM_WEIGHTS)]))).value if part is not None else math.inf

    def key(self, block: int) -> object:
        """Equal for blocks of equal minima."""
        return self.problem.node_count[:, block].tobytes() + self.problem.edge_count[:, block].tobytes()

    def workspaces(self) -> Array:
        """[num_blocks + 1]: least of the largest workspace of every block."""
        problem = self.problem
        least = np.minimum.reduceat(problem.values[WORKSPACE], problem.offsets[:-1])
        result: Array = np.max(np.where(problem.node_count > 0, least[:, None], 0.0), axis=0, initial=0.0)
        return result


def block_table(table: CostTable, block: int) -> CostTable:
    """One block (or the shared entries) as a table of its own, with the far ends of its edges for free."""
    edges = [edge for edge in table.edges if block in edge.blocks]
    inside = {i for i, node in enumerate(table.nodes) if block in node.blocks}
    used = sorted(inside | {edge.source for edge in edges} | {edge.target for edge in edges})
    position = {node: k for k, node in enumerate(used)}
    nodes = tuple(replace(table.nodes[i], blocks=(0,) * table.nodes[i].blocks.count(block)) for i in used)
    paid = tuple(
        replace(
            edge,
            source=position[edge.source],
            target=position[edge.target],
            blocks=(0,) * edge.blocks.count(block),
            cut_pairs=(),
        )
        for edge in edges
    )
    return replace(table, num_blocks=1, nodes=nodes, edges=paid, crossings=())


@dataclass(frozen=True)
class Optimist:
    """Minima of intervals, [recompute, start, stop]; entry h - 1 of tuples is for the h-th stage from the end."""

    rules: CutRules
    times: tuple[Array, ...]
    paid: tuple[Array, ...]
    fits: tuple[NDArray[np.bool_], ...]
    slope: float

    def costs(self) -> list[Array]:
        """As `cuts` wants them: inf where the interval cannot fit at that position."""
        return [np.where(fits, cost, np.inf) for fits, cost in zip(self.fits, self.paid, strict=True)]

    def bound(self) -> float:
        """Lower bound over all layouts, inf if none fits."""
        return scan_tau(self.costs(), self.times, self.slope)[0]

    def layouts(self, additive_bound: float, cutoff: float) -> Iterator[tuple[float, Layout | None]]:
        """(bound, layout) of layouts whose bound is below `cutoff`, by rising bound.

        Where both recompute values are allowed, only layouts with stages of both kinds. After MOST_STEPS steps the
        last entry has no layout: its bound holds for all that were not listed.

        Args:
            additive_bound: bound on the part of the objective that is a sum over stages.
            cutoff: of the objective.
        """
        costs, rules = self.costs(), self.rules
        num_blocks, num_stages = costs[0].shape[1], len(costs)
        rest = [np.append(np.full(num_blocks, np.inf), 0.0)]
        for cost in costs:
            rest.append(np.append((cost + rest[-1]).min(axis=(0, 2)), np.inf))
        first = _Part(max(float(rest[num_stages][0]), additive_bound), (), (), 0, 0.0, 0.0)
        heap = [first] if first.bound < cutoff else []
        for _ in range(MOST_STEPS):
            if not heap:
                return
            part = heapq.heappop(heap)
            if len(part.starts) == num_stages:
                if len(rules.recompute) == 1 or len(set(part.redo)) > 1:
                    yield part.bound, Layout(num_blocks, part.starts, part.redo, rules.schedule, rules.kinds)
                continue
            for longer in self._extend(part, costs, rest, additive_bound):
                if longer.bound < cutoff:
                    heapq.heappush(heap, longer)
        if heap:
            yield heap[0].bound, None

    def _extend(self, part: _Part, costs: list[Array], rest: list[Array], additive_bound: float) -> Iterator[_Part]:
        """`part` with one more stage, in every way that can be finished."""
        left = len(costs) - len(part.starts)
        for r, again in enumerate(self.rules.recompute):
            paid = part.paid + costs[left - 1][r, part.stop]
            slowest = np.maximum(part.slowest, self.times[left - 1][r, part.stop])
            bounds = np.maximum(paid + rest[left - 1], additive_bound) + self.slope * slowest
            starts, redo = (*part.starts, part.stop), (*part.redo, again)
            for stop in np.flatnonzero(np.isfinite(bounds)).tolist():
                bound = max(float(bounds[stop]), part.bound)
                yield _Part(bound, starts, redo, stop, float(paid[stop]), float(slowest[stop]))


@dataclass(frozen=True, order=True, slots=True)
class _Part:
    """The first stages of a layout, up to block `stop`: what they cost, and a bound on every way to go on."""

    bound: float
    starts: tuple[int, ...]
    redo: tuple[bool, ...]
    stop: int
    paid: float
    slowest: float


def make_optimist(problem: Problem, blocks: Sequence[Blocks], rules: CutRules, prices: Prices) -> Optimist:
    """Interval minima of one skeleton; `rules.recompute` are the values a stage may take.

    `blocks` are those of each type of a mixed cluster, else those of the one problem.
    """
    table, stages = problem.table, range(rules.num_stages)
    made: dict[tuple[int, Link], tuple[Array, Array]] = {}
    found = []
    for stage in reversed(stages):
        key = (rules.kinds[stage] if rules.kinds else 0), problem.link(rules.kinds, stage)
        if key not in made:
            made[key] = _minima(blocks[key[0]], rules.recompute, prices, key[1])
        found.append(made[key])
    in_flight = [microbatches_in_flight(k, rules.num_stages, table.num_microbatches, rules.schedule) for k in stages]
    memories = [_memory(blocks[0], in_flight[::-1], redo=redo) for redo in rules.recompute]
    empty = np.arange(problem.num_blocks + 1)[None, :] <= np.arange(problem.num_blocks)[:, None]
    fits = tuple(
        np.array([memory[h] <= limit * (1 + MEMORY_TOLERANCE) for memory in memories]) & ~empty
        for h, limit in enumerate(reversed(rules.memory))
    )
    slope = prices.step_weight * (table.num_microbatches - 1)
    return Optimist(rules, tuple(time for time, _ in found), tuple(cost for _, cost in found), fits, slope)


def _minima(blocks: Blocks, recompute: Sequence[bool], prices: Prices, link: Link) -> tuple[Array, Array]:
    """Least seconds and cost of every interval, [recompute, start, stop], with `link` from the stage before."""
    problem = blocks.problem
    least = [float(np.min(c.bytes_by_choice[problem.kept[c.node]])) for c in problem.table.crossings]
    seconds, joules = send_costs(problem, least, link)
    sends = (prices.step_weight * seconds + prices.beta * joules)[:, None]
    times, costs = [], []
    for redo in recompute:
        times.append(_intervals(_pay(blocks, 1.0, 0.0, redo=redo)) + seconds[:, None])
        costs.append(_intervals(_pay(blocks, prices.step_weight, prices.beta, redo=redo)) + sends)
    return np.array(times), np.array(costs)


def pay_vectors(time_weight: float, energy_weight: float, *, redo: bool) -> tuple[Array, Array]:
    """Channel weights of a block and of shared entries for time_weight * t' + energy_weight * e."""
    own, shared = np.zeros(NUM_WEIGHTS), np.zeros(NUM_WEIGHTS)
    own[TIME] = shared[TIME] = time_weight
    own[ENERGY] = shared[ENERGY] = energy_weight
    if redo:
        own[REDO], own[REDO_ENERGY] = time_weight, energy_weight
    return own, shared


def _pay(blocks: Blocks, time_weight: float, energy_weight: float, *, redo: bool) -> Array:
    return blocks.minima(*pay_vectors(time_weight, energy_weight, redo=redo))


def _memory(blocks: Blocks, in_flight: Sequence[int], *, redo: bool) -> list[Array]:
    """Least bytes of every interval, per position from the end."""
    few, many = min(in_flight), max(in_flight)
    low, high = _kept(blocks, few, redo=redo), _kept(blocks, many, redo=redo)
    workspaces = blocks.workspaces()
    fixed = running_max(workspaces[:-1], float(workspaces[-1]))
    if redo:
        activations = np.zeros(NUM_WEIGHTS)
        activations[ACTIVATION] = 1.0
        fixed = fixed + running_max(blocks.minima(activations, np.zeros(NUM_WEIGHTS))[:-1], 0.0)
    result = []
    for count in in_flight:
        share = (count - few) / (many - few) if many > few else 0.0
        result.append(_intervals(low + share * (high - low)) + fixed)
    return result


def _kept(blocks: Blocks, in_flight: int, *, redo: bool) -> Array:
    vector = np.zeros(NUM_WEIGHTS)
    vector[STATE] = 1.0
    vector[BOUNDARY if redo else ACTIVATION] = in_flight
    return blocks.minima(vector, vector)


def _intervals(per_block: Array) -> Array:
    """[start, stop] sums over blocks plus the shared entry."""
    prefix = np.concatenate([[0.0], np.cumsum(per_block[:-1])])
    result: Array = prefix[None, :] - prefix[:-1, None] + per_block[-1]
    return result
