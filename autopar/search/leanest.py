"""Leanest: the smallest peak memory of a skeleton, and the plan that has it.

    minimise tau   s.t.   memory of stage k <= tau   for every stage

is the same kind of program as the search's own (`bounds`), with no objective but tau and memory rows in place of time
rows. Cuts of given shardings come from the cut programme with the maximum in place of the sum.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from autopar.ir.cost import Array, Device
from autopar.search.bounds import LayoutBound, tighten
from autopar.search.branch import close_gap
from autopar.search.cuts import CutRules, chain, intervals_by_position, memory_by_position
from autopar.search.evaluate import Figures, Layout, evaluate
from autopar.search.problem import ACTIVATION, NUM_WEIGHTS, WORKSPACE, Problem, Weights
from autopar.search.rows import combine, state_row

FEW_LAYOUTS = 40
MOST_CEILINGS = 40
EXACT_ENTRIES = 500
"""Strategies + pairs up to which the least peak is proven; far above, plans near it are found without proof."""
TOLERANCE = 1e-3
"""Relative distance to the least peak at which the search for it stops."""


@dataclass(frozen=True)
class Lean:
    """Plan of least peak memory found; `proven` if no plan of the skeleton needs less
    (beyond TOLERANCE).
    """

    layout: Layout
    figures: Figures
    proven: bool


@dataclass
class _Best:
    problem: Problem
    device: Device
    rules: CutRules
    found: tuple[Layout, Figures] | None = None

    @property
    def peak(self) -> float:
        return self.found[1].peak_memory_bytes if self.found else math.inf

    def offer(self, choice: tuple[int, ...]) -> float:
        """Keep the leanest cuts of these shardings; returns the peak that a bound must reach."""
        intervals = intervals_by_position(self.problem, choice, self.rules)
        memory = memory_by_position(intervals, self.rules, self.problem.table.num_microbatches)
        peak, path = chain(memory, largest=True)
        if path and peak < self.peak:
            starts, redo = tuple(s for s, _ in path), tuple(self.rules.recompute[r] for _, r in path)
            layout = Layout(self.problem.num_blocks, starts, redo, self.rules.schedule)
            figures = evaluate(self.problem.table, self.device, layout, self.problem.original(choice))
            if figures.peak_memory_bytes < self.peak:
                self.found = layout, figures
        return self.peak * (1 - TOLERANCE)


class LeanBound(LayoutBound):
    """A layout bound whose memory rows read `memory - tau <= 0`."""

    def add_memory_rows(self, choice: tuple[int, ...], totals: Array) -> bool:
        """As the base class, with every row near `choice`: all of them are broken at a limit of zero."""
        before = len(self.rows)
        tau_rows, self.memory_bytes = self.rows, 0.0
        known = {row.key for row in tau_rows}
        super().add_memory_rows(choice, totals)
        self.memory_bytes = math.inf
        self.rows = tau_rows[:before] + [
            replace(row, tau_coefficient=1.0) for row in self.rows[before:] if row.key not in known
        ]
        return len(self.rows) > before


def leanest(problem: Problem, device: Device, rules: CutRules, *, exact: bool) -> Lean | None:
    """Smallest peak memory of one skeleton; if not `exact`, or with many layouts, a reachable value close to it.

    `rules.memory` is ignored.
    """
    best = _Best(problem, device, rules)
    starts = itertools.combinations(range(1, problem.num_blocks), rules.num_stages - 1)
    patterns = list(itertools.product(rules.recompute, repeat=rules.num_stages))
    layouts = [
        Layout(problem.num_blocks, (0, *cut), redo, rules.schedule)
        for cut in itertools.islice(starts, FEW_LAYOUTS + 1)
        for redo in patterns
    ]
    proven = exact and len(layouts) <= FEW_LAYOUTS and problem.num_entries <= EXACT_ENTRIES
    if not proven:
        layouts = _even_layouts(problem, rules)
    for layout in layouts:
        _lower_workspaces(best, layout)
        if not exact:
            continue
        work = _lean_bound(problem, layout)
        tighten(work, best.offer, TOLERANCE)
        if proven and work.bound < best.peak * (1 - TOLERANCE):
            close_gap(work, best.offer, TOLERANCE / 4)
    return Lean(*best.found, proven) if best.found else None


def _lower_workspaces(best: _Best, layout: Layout) -> None:
    """Least state, kept bytes and largest block under a falling ceiling on workspaces: one elimination each."""
    problem = best.problem
    rows = [(1.0, state_row(problem, layout, k, 0.0).weights) for k in range(layout.num_stages)]
    weights = combine(rows)
    first = problem.solve(weights).choice
    if first is not None:
        activations = problem.block_totals(first)[ACTIVATION]
        for k in range(layout.num_stages):
            if layout.recompute[k]:
                start = layout.starts[k]
                weights.blocks[start + int(np.argmax(activations[start : layout.stop(k)])), ACTIVATION] += 1.0
    workspaces = problem.values[WORKSPACE]
    ceiling = math.inf
    for _ in range(MOST_CEILINGS):
        barriers = {
            int(node): np.where(problem.node_values(int(node), WORKSPACE) >= ceiling, np.inf, 0.0)
            for node in np.unique(problem.node_of[workspaces >= ceiling])
        }
        run = problem.solve(Weights(weights.blocks, weights.nodes, barriers))
        if run.choice is None or run.value / layout.num_stages >= best.peak:
            return
        best.offer(run.choice)
        ceiling = float(np.max(workspaces[problem.offsets[:-1] + np.array(run.choice)]))


def _even_layouts(problem: Problem, rules: CutRules) -> list[Layout]:
    even = tuple(problem.num_blocks * k // rules.num_stages for k in range(rules.num_stages))
    return [Layout(problem.num_blocks, even, (redo,) * rules.num_stages, rules.schedule) for redo in rules.recompute]


def _lean_bound(problem: Problem, layout: Layout) -> LeanBound:
    nothing = Weights(np.zeros((problem.num_blocks + 1, NUM_WEIGHTS)))
    rows = [replace(state_row(problem, layout, k, 0.0), tau_coefficient=1.0) for k in range(layout.num_stages)]
    return LeanBound(problem, layout, nothing, 1.0, math.inf, rows)
