"""The only door to OR-Tools: linear and mixed-integer programs for HiGHS through MathOpt, integers for CP-SAT.

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
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt import model_pb2, sparse_containers_pb2
from ortools.math_opt.python import mathopt

from autopar.ir.cost import Array

LARGEST_COEFFICIENT = 1e4
SEED = 1
CP_WORKERS = 8
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


@dataclass(frozen=True)
class IntegerRow:
    """lower <= sum of weight x column <= upper (None: no limit), if column `when` is 1 and column `unless` is 0."""

    terms: tuple[tuple[int, int], ...]
    lower: int | None
    upper: int | None
    when: int | None
    unless: int | None


@dataclass
class IntegerModel:
    """minimise the column `objective` over integers within bounds and rows; `hint`: column -> value to try first."""

    bounds: list[tuple[int, int]] = field(default_factory=list)
    rows: list[IntegerRow] = field(default_factory=list)
    hint: dict[int, int] = field(default_factory=dict)
    objective: int = 0

    def variable(self, lower: int, upper: int) -> int:
        """A new column."""
        self.bounds.append((lower, upper))
        return len(self.bounds) - 1

    def row(
        self,
        terms: list[tuple[int, int]],
        lower: int | None,
        upper: int | None,
        *,
        when: int | None = None,
        unless: int | None = None,
    ) -> None:
        """A new row."""
        self.rows.append(IntegerRow(tuple(terms), lower, upper, when, unless))


@dataclass(frozen=True)
class IntegerResult:
    """`bound` <= optimum <= `objective`, both in the model's integers; statuses as in `ProgramResult`."""

    status: str
    values: tuple[int, ...] | None
    objective: float
    bound: float


def solve_integers(model: IntegerModel, *, time_limit_s: float) -> IntegerResult:
    """Solve with CP-SAT and eight workers, whatever the cores: fewer leave out the strategies that prove.

    Optimum and bound of a finished run are deterministic, the values that attain them are not.
    """
    from ortools.sat.python import cp_model

    program = cp_model.CpModel()
    columns = [program.new_int_var(lower, upper, "") for lower, upper in model.bounds]
    for row in model.rows:
        total = cp_model.LinearExpr.weighted_sum([columns[c] for c, _ in row.terms], [w for _, w in row.terms])
        lower = cp_model.INT_MIN if row.lower is None else row.lower
        upper = cp_model.INT_MAX if row.upper is None else row.upper
        constraint = program.add_linear_constraint(total, lower, upper)
        if row.when is not None:
            constraint.only_enforce_if(columns[row.when])
        if row.unless is not None:
            constraint.only_enforce_if(columns[row.unless].negated())
    for column, value in sorted(model.hint.items()):
        program.add_hint(columns[column], value)
    program.minimize(columns[model.objective])
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = CP_WORKERS
    solver.parameters.random_seed = SEED
    solver.parameters.max_time_in_seconds = max(time_limit_s, 1e-3)
    status = solver.solve(program)
    if status == cp_model.INFEASIBLE:
        return IntegerResult("infeasible", None, math.inf, math.inf)
    bound = solver.best_objective_bound
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return IntegerResult("no-solution", None, math.inf, bound)
    values = tuple(int(solver.value(column)) for column in columns)
    return IntegerResult("optimal" if status == cp_model.OPTIMAL else "feasible", values, solver.objective_value, bound)
