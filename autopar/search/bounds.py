"""Lagrangian bounds for a fixed layout: multipliers on stage times and stage memories, found by a small linear program.

    minimise_p,tau   c(p) + d tau      s.t.   a_r(p) - d_r tau <= b_r   for every row r

For multipliers m >= 0 with sum_r m_r d_r <= d,

    L(m) = min_p [ c(p) + sum_r m_r a_r(p) ] - sum_r m_r b_r   <=   optimum,

and the inner problem is a pairwise network, solved exactly by elimination. The best m are the duals of the master

    min  sum_c z_c c(p_c) + d tau + penalty * slack
    s.t. sum_c z_c a_r(p_c) - d_r tau - scale_r slack <= b_r ,  sum_c z_c = 1 ,  z, tau, slack >= 0

over the choices p_c met so far (Dantzig-Wolfe, equal to Kelley's cutting planes on L). Memory rows are added when a
choice breaks them; a limit on a T + b D is a row with d_r = -a (M - 1). Each p_c is offered to the caller, who makes
feasible plans of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.ir.cost import Array
from autopar.search.cuts import Prices
from autopar.search.evaluate import MEMORY_TOLERANCE, Layout
from autopar.search.problem import Problem, Weights
from autopar.search.rows import LinearRow, combine, memory_rows, objective_weights, state_row, time_rows, value_of
from autopar.search.solver import Program, solve_program

MAX_ROUNDS = 40
PENALTY = 1e3

Offer = Callable[[tuple[int, ...]], float]
"""Makes plans from a choice; returns the value that a bound must reach for its owner to be discarded."""


@dataclass
class LayoutBound:
    """A fixed layout under work, or (layout None) a relaxation whose rows are all given.

    Attributes:
        bound: best lower bound so far, inf if proven infeasible.
        multipliers: of the first of `rows`, at the best bound.
        shares: weight of each of `points` in the last master.
        rows: time rows, then memory rows met so far.
        memory_by_stage: in place of `memory_bytes` where stages differ.
    """

    problem: Problem
    layout: Layout | None
    base: Weights
    tau_cost: float
    memory_bytes: float
    rows: list[LinearRow]
    bound: float = -math.inf
    multipliers: Array = field(default_factory=lambda: np.zeros(0))
    points: list[tuple[tuple[int, ...], Array]] = field(default_factory=list)
    shares: Array = field(default_factory=lambda: np.zeros(0))
    memory_by_stage: tuple[float, ...] = ()

    def limit_bytes(self, stage: int) -> float:
        """Memory of one device of a stage."""
        return self.memory_by_stage[stage] if self.memory_by_stage else self.memory_bytes

    def combined(self) -> tuple[Weights, float]:
        """Objective plus multipliers times rows, and the constant to add to its minimum."""
        pairs = list(zip(self.multipliers, self.rows, strict=False))
        weights = combine([(1.0, self.base), *((float(m), row.weights) for m, row in pairs)])
        return weights, weights.constant - sum(float(m) * row.limit for m, row in pairs)

    def add_memory_rows(self, choice: tuple[int, ...], totals: Array) -> bool:
        """Add the rows that `choice` breaks; False if it breaks none."""
        if self.layout is None:
            return False
        known = {row.key for row in self.rows}
        added = False
        for stage in range(self.layout.num_stages):
            limit = self.limit_bytes(stage)
            for row in memory_rows(self.problem, self.layout, stage, choice, totals, memory_bytes=limit):
                used = value_of(self.problem, row.weights, choice, totals)
                if used > limit * (1 + MEMORY_TOLERANCE) and row.key not in known:
                    self.rows.append(row)
                    added = True
        return added


def make_layout_bound(problem: Problem, layout: Layout, prices: Prices, memory: Sequence[float]) -> LayoutBound:
    """`memory`: bytes of one device, per stage."""
    tau_cost = prices.step_weight * (problem.table.num_microbatches - 1)
    rows = time_rows(problem, layout) if tau_cost > 0 and layout.num_stages > 1 else []
    base = objective_weights(problem, layout, prices)
    if tau_cost > 0 and layout.num_stages == 1:
        base = combine([(1.0, base), (tau_cost, time_rows(problem, layout)[0].weights)])
        tau_cost = 0.0
    return LayoutBound(problem, layout, base, tau_cost, max(memory), rows, memory_by_stage=tuple(memory))


def add_limits(work: LayoutBound, layout: Layout, limits: Sequence[tuple[Prices, float]]) -> None:
    """Add the rows step_weight * T + beta * D <= limit of a layout's plans."""
    waits = work.problem.table.num_microbatches - 1
    for index, (prices, limit) in enumerate(limits):
        weights, slope = objective_weights(work.problem, layout, prices), prices.step_weight * waits
        if slope > 0 and layout.num_stages == 1:
            weights = combine([(1.0, weights), (slope, time_rows(work.problem, layout)[0].weights)])
            slope = 0.0
        if slope > 0 and work.tau_cost == 0 and not any(row.tau_coefficient > 0 for row in work.rows):
            work.rows = [*time_rows(work.problem, layout), *work.rows]
        work.rows.append(LinearRow(weights, limit, -slope, (2, index)))


def tighten(work: LayoutBound, offer: Offer, tolerance: float) -> None:
    """Raise `work.bound` until it reaches the offered cutoff, the master's value, or the round limit."""
    if not _memory_reachable(work):
        work.bound = math.inf
        return
    multipliers = _start(work)
    for _ in range(MAX_ROUNDS):
        weights, constant = replace(work, multipliers=multipliers).combined()
        run = work.problem.solve(weights)
        if not math.isfinite(run.value):
            work.bound = math.inf
            return
        bound = run.value + constant
        if bound > work.bound or len(work.multipliers) == 0:
            work.bound, work.multipliers = max(bound, work.bound), multipliers
        if run.choice is None or bound >= offer(run.choice):
            return
        totals = work.problem.block_totals(run.choice)
        work.points.append((run.choice, totals))
        added = work.add_memory_rows(run.choice, totals)
        if not work.rows:
            return
        master, multipliers = _master(work)
        if not added and master - work.bound <= tolerance * abs(master):
            return
    return


def _start(work: LayoutBound) -> Array:
    """Multipliers to begin with: those known, else tau's cost spread over the rows that have tau."""
    if len(work.multipliers):
        return padded(work.multipliers, len(work.rows))
    taus = np.maximum([row.tau_coefficient for row in work.rows], 0.0)
    return taus * (work.tau_cost / taus.sum()) if taus.any() else np.zeros(len(taus))


def _memory_reachable(work: LayoutBound) -> bool:
    """Whether every stage (and every given memory row) can be met by itself, workspaces left out."""
    rows = [row for row in work.rows if row.tau_coefficient == 0]
    if work.layout is not None and math.isfinite(work.memory_bytes):
        layout = work.layout
        rows += [state_row(work.problem, layout, k, work.limit_bytes(k)) for k in range(layout.num_stages)]
    return all(
        work.problem.solve(row.weights).value + row.weights.constant <= row.limit * (1 + MEMORY_TOLERANCE)
        for row in rows
    )


def _master(work: LayoutBound) -> tuple[float, Array]:
    """Value of the master of the module docstring and its multipliers."""
    problem, rows = work.problem, work.rows
    costs = [value_of(problem, work.base, p, totals) for p, totals in work.points]
    matrix = np.array([[value_of(problem, row.weights, p, t) for p, t in work.points] for row in rows])
    limits = np.array([row.limit for row in rows])
    scale = np.maximum(np.abs(matrix).max(axis=1), 1e-300)
    num_points, num_rows = len(costs), len(rows)
    penalty = PENALTY * max(1e-300, *(abs(c) for c in costs))
    is_elastic = np.array([row.tau_coefficient <= 0 for row in rows], dtype=np.float64)
    taus = np.array([row.tau_coefficient for row in rows])
    time_scale = float(np.max(scale[taus > 0], initial=1e-300))
    dense = np.zeros((num_rows + 1, num_points + 2))
    dense[:num_rows, :num_points] = matrix / scale[:, None]
    dense[:num_rows, num_points] = -taus * time_scale / scale
    dense[:num_rows, num_points + 1] = -is_elastic
    dense[num_rows, :num_points] = 1.0
    used = np.nonzero(dense)
    result = solve_program(
        Program(
            cost=np.array([*costs, work.tau_cost * time_scale, penalty]),
            lower=np.zeros(num_points + 2),
            upper=np.full(num_points + 2, np.inf),
            integer=np.zeros(num_points + 2, dtype=bool),
            rows=used[0],
            columns=used[1],
            coefficients=dense[used],
            row_lower=np.array([-np.inf] * num_rows + [1.0]),
            row_upper=np.append(limits / scale, 1.0),
        )
    )
    if result.duals is None:
        return work.bound, padded(work.multipliers, num_rows)
    if result.values is not None:
        work.shares = result.values[:num_points]
    multipliers = np.maximum(-result.duals[:num_rows], 0.0) / scale
    return result.objective, _tau_feasible(multipliers, taus, work.tau_cost)


def padded(multipliers: Array, count: int) -> Array:
    """Zeros for the rows that came later."""
    return np.append(multipliers, np.zeros(count - len(multipliers)))


def _tau_feasible(multipliers: Array, taus: Array, tau_cost: float) -> Array:
    """Scale the time multipliers down where rounding made their sum exceed what tau costs, limits on T included."""
    priced = tau_cost + float(multipliers @ np.maximum(-taus, 0.0))
    total = float(multipliers @ np.maximum(taus, 0.0))
    return np.where(taus > 0, multipliers * (priced / total), multipliers) if total > priced else multipliers
