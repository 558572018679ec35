"""The only door to OR-Tools: a linear or mixed-integer program as arrays, solved by HiGHS through MathOpt.

Statuses follow MathOpt: `optimal` (within the asked gap), `feasible` (stopped with an answer), `infeasible` (proven),
`no-solution` (stopped without an answer). The objective is scaled before the solve and unscaled after it.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt import model_pb2, sparse_containers_pb2
from ortools.math_opt.python import mathopt

from autopar.ir.cost import Array

LARGEST_COEFFICIENT = 1e4
SEED = 1
STDOUT = 1
"""File descriptor of the process's standard output."""


@dataclass(frozen=True)
class Program:
    """minimise cost x  s.t.  row_lower <= A x <= row_upper, lower <= x <= upper, x[integer] integral.

    A is given by triples (row, column, value), without duplicates, sorted by (row, column).
    """

    cost: Array
    lower: Array
    upper: Array
    integer: NDArray[np.bool_]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    coefficients: Array
    row_lower: Array
    row_upper: Array


@dataclass(frozen=True)
class ProgramResult:
    """`bound` <= optimum <= `objective`; `duals` (one per row) for linear programs only."""

    status: str
    values: Array | None
    objective: float
    bound: float
    duals: Array | None = None


def solve_program(program: Program, *, relative_gap: float = 1e-9, time_limit_s: float | None = None) -> ProgramResult:
    """Solve with HiGHS on one thread, deterministically unless the time limit strikes."""
    scale = _objective_scale(program.cost)
    model = mathopt.Model.from_model_proto(_model_proto(program, scale))
    parameters = mathopt.SolveParameters(relative_gap_tolerance=relative_gap, random_seed=SEED)
    if time_limit_s is not None:
        parameters.time_limit = datetime.timedelta(seconds=max(time_limit_s, 1e-3))
    parameters.highs.int_options["threads"] = 1
    with _quiet_stdout():
        result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    is_linear = not bool(program.integer.any())
    reason = result.termination.reason
    if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        return ProgramResult("infeasible", None, math.inf, math.inf)
    bound = result.termination.objective_bounds.dual_bound / scale
    if not result.has_primal_feasible_solution():
        return ProgramResult("no-solution", None, math.inf, bound)
    values = np.array(result.variable_values(list(model.variables())), dtype=np.float64)
    status = "optimal" if reason == mathopt.TerminationReason.OPTIMAL else "feasible"
    objective = float(program.cost @ values)
    duals = None
    if is_linear and result.has_dual_feasible_solution():
        duals = np.array(result.dual_values(list(model.linear_constraints())), dtype=np.float64) / scale
    return ProgramResult(status, values, objective, min(bound, objective), duals)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send the process's stdout to nowhere: HiGHS 1.12 prints a debugging line from C++ even when told to be silent."""
    sys.stdout.flush()
    try:
        saved = os.dup(STDOUT)
    except OSError:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDOUT)
        yield
    finally:
        os.dup2(saved, STDOUT)
        os.close(nowhere)
        os.close(saved)


def _objective_scale(cost: Array) -> float:
    largest = float(np.max(np.abs(cost), initial=0.0))
    return 2.0 ** round(math.log2(LARGEST_COEFFICIENT / largest)) if largest > 0 else 1.0


def _model_proto(program: Program, scale: float) -> model_pb2.ModelProto:
    used = np.flatnonzero(program.cost)
    return model_pb2.ModelProto(
        variables=model_pb2.VariablesProto(
            ids=range(len(program.cost)),
            lower_bounds=program.lower,
            upper_bounds=program.upper,
            integers=program.integer,
        ),
        objective=model_pb2.ObjectiveProto(
            linear_coefficients=sparse_containers_pb2.SparseDoubleVectorProto(
                ids=used, values=program.cost[used] * scale
            )
        ),
        linear_constraints=model_pb2.LinearConstraintsProto(
            ids=range(len(program.row_lower)), lower_bounds=program.row_lower, upper_bounds=program.row_upper
        ),
        linear_constraint_matrix=sparse_containers_pb2.SparseDoubleMatrixProto(
            row_ids=program.rows, column_ids=program.columns, coefficients=program.coefficients
        ),
    )
