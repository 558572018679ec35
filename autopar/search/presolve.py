"""Presolve: exact reductions of a network with linear rows before HiGHS sees it.

Dominance: strategy p of node i goes if another p' of i costs no more whatever the neighbours choose, in the objective
and in every row f:

    f_i[p'] - f_i[p] + sum_j max_q ( f_ij[p', q] - f_ij[p, q] ) <= 0        (q over pairs that p can form)

where a pair that p can form and p' cannot counts as +inf. Elimination: a node that no row tells apart, with at most
two neighbours, leaves by min-plus (`reduce`). Both repeat until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.ilp import Row, solve_ilp
from autopar.search.reduce import (
    Elimination,
    Network,
    Plan,
    back_substitute,
    core_network,
    make_plan,
    restrict,
    run_plan,
)
from autopar.search.solver import ProgramResult

ELIMINATION_CAP = 2_500
"""Largest table that elimination makes here, entries: larger ones cost HiGHS more columns than they save."""
MAX_PASSES = 10
LARGEST_ILP = 12_000
"""Pairs that HiGHS is given at most: above, the LP alone takes seconds. Then the status is `no-solution`."""

Index = NDArray[np.int64]


def dominance(objective: Network, rows: Sequence[Row]) -> list[Index]:
    """Strategies to keep per node; see the module docstring."""
    functionals = [objective, *(row.functional for row in rows)]
    keep = [np.ones(len(c), dtype=bool) for c in objective.unary]
    incident: list[list[tuple[int, int]]] = [[] for _ in keep]
    for pair in sorted(objective.pairs):
        incident[pair[0]].append(pair)
        incident[pair[1]].append(pair)
    for node, alive in enumerate(keep):
        if len(alive) < 2:
            continue
        worse = ~np.eye(len(alive), dtype=bool)
        for functional in functionals:
            worse &= _never_more(objective, functional, node, incident[node], keep) <= 0
            if not worse.any():
                break
        for p in range(len(alive) - 1, -1, -1):
            alive[p] = not np.any(worse[alive, p])
    return [np.flatnonzero(k) for k in keep]


def _never_more(
    objective: Network,
    functional: Network,
    node: int,
    pairs: Sequence[tuple[int, int]],
    keep: Sequence[NDArray[np.bool_]],
) -> Array:
    """[p', p]: largest increase of the functional when p is replaced by p'."""
    cost = functional.unary[node]
    usable = np.isfinite(objective.unary[node])
    finite = np.where(usable, cost, 0.0)
    total = finite[:, None] - finite[None, :]
    total[~usable, :] = np.inf
    total[:, ~usable] = -np.inf
    for pair in pairs:
        if pair not in functional.pairs and functional is not objective:
            continue
        legal, table = np.isfinite(objective.pairs[pair]), functional.pairs[pair]
        if pair[0] != node:
            legal, table = legal.T, table.T
        columns = keep[pair[0] if pair[1] == node else pair[1]]
        legal = legal[:, columns]
        values = np.where(legal, table[:, columns], 0.0)
        step = values[:, None, :] - values[None, :, :]
        step = np.where(legal[None, :, :], np.where(legal[:, None, :], step, np.inf), -np.inf)
        with np.errstate(invalid="ignore"):
            total = total + step.max(axis=2, initial=-np.inf)
    return np.where(np.isnan(total), np.inf, total)


@dataclass
class _Reduction:
    """One elimination: how to go back from the core's strategies to all."""

    keep: list[Index]
    run: Elimination

    def restore(self, core: Sequence[int]) -> tuple[int, ...]:
        choice = [0] * len(self.run.plan.sizes)
        for node, strategy in zip(self.run.plan.core, core, strict=True):
            choice[node] = strategy
        full = back_substitute(self.run, choice)
        return tuple(int(k[p]) for k, p in zip(self.keep, full, strict=True))


def solve_reduced(
    objective: Network, rows: Sequence[Row], *, tau_cost: float = 0.0, relative_gap: float = 1e-9
) -> tuple[ProgramResult, tuple[int, ...] | None]:
    """`solve_ilp` after the module's reductions; values and strategies are those of the unreduced program."""
    reductions: list[_Reduction] = []
    constant, left = 0.0, list(rows)
    for _ in range(MAX_PASSES):
        keep = dominance(objective, left)
        removed = sum(len(c) for c in objective.unary) - sum(len(k) for k in keep)
        objective = restrict(objective, keep)
        left = [Row(restrict(row.functional, keep), row.limit, row.tau_coefficient) for row in left]
        free = [_is_free(objective, left, node) for node in range(len(objective.unary))]
        sizes = tuple(len(c) for c in objective.unary)
        plan = make_plan(sizes, sorted(objective.pairs), ELIMINATION_CAP, max_scope=2, candidates=free)
        run = run_plan(plan, objective)
        reductions.append(_Reduction(keep, run))
        constant += run.value
        if not plan.core:
            status = "infeasible" if run.choice is None or any(_constant_excess(r, plan) for r in left) else "optimal"
            result = ProgramResult(status, None, constant, constant)
            return result, _restore(reductions, ()) if status == "optimal" else None
        left = [Row(*_core_row(row, plan), row.tau_coefficient) for row in left]
        objective = core_network(run)
        if not removed and not plan.steps:
            break
    if sum(table.size for table in objective.pairs.values()) > LARGEST_ILP:
        return ProgramResult("no-solution", None, math.inf, -math.inf), None
    result, core = solve_ilp(objective, left, tau_cost=tau_cost, relative_gap=relative_gap)
    shifted = ProgramResult(result.status, None, result.objective + constant, result.bound + constant)
    return shifted, None if core is None else _restore(reductions, core)


def _restore(reductions: Sequence[_Reduction], core: tuple[int, ...]) -> tuple[int, ...]:
    for reduction in reversed(reductions):
        core = reduction.restore(core)
    return core


def _constant_excess(row: Row, plan: Plan) -> bool:
    """Whether a row without any node left is broken."""
    return row.tau_coefficient == 0 and _core_row(row, plan)[1] < 0


def _is_free(objective: Network, rows: Sequence[Row], node: int) -> bool:
    """No row tells the node's strategies apart."""
    if any(np.ptp(row.functional.unary[node]) != 0 for row in rows):
        return False
    incident = [pair for pair in objective.pairs if node in pair]
    return not any(
        np.any(row.functional.pairs[p][np.isfinite(objective.pairs[p])])
        for row in rows
        for p in incident
        if p in row.functional.pairs
    )


def _core_row(row: Row, plan: Plan) -> tuple[Network, float]:
    """The row over the core alone, and its limit less what the eliminated nodes use anyway."""
    position = {v: k for k, v in enumerate(plan.core)}
    used = sum(float(row.functional.unary[step.node][0]) for step in plan.steps)
    pairs = {
        (position[i], position[j]): table
        for (i, j), table in row.functional.pairs.items()
        if i in position and j in position
    }
    return Network(tuple(row.functional.unary[v] for v in plan.core), pairs), row.limit - used
