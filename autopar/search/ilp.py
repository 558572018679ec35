"""Sharding as a mixed-integer program: the marginal formulation of a pairwise network with linear rows.

    min   sum_i sum_p c_ip s_ip + sum_(i,j) sum_pq r_ij,pq y_ij,pq + tau_cost * tau        (objective)
    s.t.  sum_p s_ip = 1                                   for every node i                (choose)
          sum_q y_ij,pq = s_ip                             for every pair (i,j) and p      (marginals)
          sum_p y_ij,pq = s_jq                             for every pair (i,j) and q      (marginals)
          sum a^r_ip s_ip + sum a^r_ij,pq y_ij,pq - d^r tau <= b^r     for every row r     (rows)
          s binary, 0 <= y <= 1, tau >= 0

Forbidden pairs have no column. With binary s the marginals force y, so y is continuous. Rows are stage memories
(d = 0, one row per choice of the nodes that hold the largest workspace and block) and stage times (d = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.reduce import Network
from autopar.search.solver import Program, ProgramResult, solve_program

ROW_SCALE = 1000.0


@dataclass(frozen=True)
class Row:
    """functional(choice) - tau_coefficient * tau <= limit; `functional` has the objective network's structure."""

    functional: Network
    limit: float
    tau_coefficient: float = 0.0


@dataclass(frozen=True)
class _Columns:
    """Column numbers: `first[i]` of node i's strategies; per pair the finite (p, q) and their first column; tau."""

    first: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    finite: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    first_pair: tuple[int, ...]
    tau: int


class _Matrix:
    """Triples of the constraint matrix, gathered row block by row block."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.int64]] = []
        self.columns: list[NDArray[np.int64]] = []
        self.values: list[Array] = []
        self.lower: list[Array] = []
        self.upper: list[Array] = []
        self.count = 0

    def add(self, rows: NDArray[np.int64], columns: NDArray[np.int64], values: Array) -> None:
        self.rows.append(rows + self.count)
        self.columns.append(columns)
        self.values.append(values)

    def close(self, lower: Array, upper: Array) -> None:
        """End a block of len(lower) rows."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.count += len(lower)


def solve_ilp(
    objective: Network,
    rows: Sequence[Row] = (),
    *,
    tau_cost: float = 0.0,
    relative_gap: float = 1e-9,
    time_limit_s: float | None = None,
) -> tuple[ProgramResult, tuple[int, ...] | None]:
    """Solve the module's program; the second entry is the chosen strategy per node."""
    columns = _number(objective)
    matrix = _Matrix()
    _choose(objective, columns, matrix)
    _marginals(objective, columns, matrix)
    for row in rows:
        _row(row, columns, matrix)
    cost = np.zeros(columns.tau + 1)
    _spread(objective, columns, cost)
    cost[columns.tau] = tau_cost
    is_node = np.arange(columns.tau + 1) < (columns.first_pair[0] if columns.first_pair else columns.tau)
    upper = np.ones(columns.tau + 1)
    upper[columns.tau] = math.inf
    order = np.lexsort((np.concatenate(matrix.columns), np.concatenate(matrix.rows)))
    program = Program(
        cost=cost,
        lower=np.zeros(columns.tau + 1),
        upper=upper,
        integer=is_node,
        rows=np.concatenate(matrix.rows)[order],
        columns=np.concatenate(matrix.columns)[order],
        coefficients=np.concatenate(matrix.values)[order],
        row_lower=np.concatenate(matrix.lower),
        row_upper=np.concatenate(matrix.upper),
    )
    result = solve_program(program, relative_gap=relative_gap, time_limit_s=time_limit_s)
    if result.values is None:
        return result, None
    ends = (*columns.first[1:], columns.first_pair[0] if columns.first_pair else columns.tau)
    choice = tuple(int(np.argmax(result.values[a:b])) for a, b in zip(columns.first, ends, strict=True))
    return result, choice


def _number(objective: Network) -> _Columns:
    sizes = [len(c) for c in objective.unary]
    first = np.concatenate([[0], np.cumsum(sizes)])
    pairs = tuple(sorted(objective.pairs))
    finite = [np.nonzero(np.isfinite(objective.pairs[pair])) for pair in pairs]
    counts = np.concatenate([[0], np.cumsum([len(p) for p, _ in finite])]).astype(np.int64) + first[-1]
    first_pair = tuple(int(c) for c in counts[:-1])
    return _Columns(
        tuple(int(f) for f in first[:-1]), pairs, tuple((p, q) for p, q in finite), first_pair, int(counts[-1])
    )


def _spread(network: Network, columns: _Columns, out: Array) -> None:
    """Write a network's coefficients to their columns; pairs made by presolve are in no row."""
    for cost, start in zip(network.unary, columns.first, strict=True):
        out[start : start + len(cost)] = np.where(np.isfinite(cost), cost, 0.0)
    for pair, (p, q), start in zip(columns.pairs, columns.finite, columns.first_pair, strict=True):
        if pair in network.pairs:
            out[start : start + len(p)] = network.pairs[pair][p, q]


def _choose(objective: Network, columns: _Columns, matrix: _Matrix) -> None:
    """sum_p s_ip = 1 over usable strategies; s_ip = 0 for those of infinite cost."""
    for i, (cost, start) in enumerate(zip(objective.unary, columns.first, strict=True)):
        usable = np.flatnonzero(np.isfinite(cost))
        matrix.add(np.full(len(usable), i), start + usable, np.ones(len(usable)))
    ones = np.ones(len(objective.unary))
    matrix.close(ones, ones)
    for cost, start in zip(objective.unary, columns.first, strict=True):
        unusable = np.flatnonzero(~np.isfinite(cost))
        if len(unusable):
            matrix.add(np.arange(len(unusable)), start + unusable, np.ones(len(unusable)))
            matrix.close(np.zeros(len(unusable)), np.zeros(len(unusable)))


def _marginals(objective: Network, columns: _Columns, matrix: _Matrix) -> None:
    """sum_q y_pq - s_p = 0 and sum_p y_pq - s_q = 0."""
    for pair, (p, q), start in zip(columns.pairs, columns.finite, columns.first_pair, strict=True):
        y = start + np.arange(len(p))
        for node, index in zip(pair, (p, q), strict=True):
            size = len(objective.unary[node])
            matrix.add(index, y, np.ones(len(y)))
            matrix.add(np.arange(size), columns.first[node] + np.arange(size), -np.ones(size))
            matrix.close(np.zeros(size), np.zeros(size))


def _row(row: Row, columns: _Columns, matrix: _Matrix) -> None:
    """Sum a s + sum a y - d tau <= b, scaled so that the largest coefficient is ROW_SCALE."""
    values = np.zeros(columns.tau + 1)
    _spread(row.functional, columns, values)
    values[columns.tau] = -row.tau_coefficient
    largest = float(np.max(np.abs(values), initial=0.0))
    scale = ROW_SCALE / largest if largest > 0 else 1.0
    used = np.flatnonzero(values)
    matrix.add(np.zeros(len(used), dtype=np.int64), used, values[used] * scale)
    matrix.close(np.array([-math.inf]), np.array([row.limit * scale]))
