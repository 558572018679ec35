"""The linear relaxation of the clock problem: durations on the lower convex hulls of the options.

Columns: start s_v of every instruction, the step's length T, and one column per hull segment, 0 <= x_k <= its length
in time, with the segment's slope in J/s as its cost. The duration is d_v = t_first + sum of x_k: slopes rise, so a
cheapest solution fills segments in order.

    min  sum of slope x + P_waiting T
    s.t. s_w - s_v - d_v >= delay(v, w),  T - s_v - d_v >= 0,  least <= T <= deadline

Its value plus the energies of the first hull points is a lower bound on every choice of options. Source: the
Perseus/lowtime time-cost relaxation (Phillips and Dessouky 1977), on measured options instead of fitted curves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.errors import SolverLimitError
from autopar.ir.cost import Array
from autopar.search.clock_schedule import Network
from autopar.search.solver import Program, solve_program

Triples = tuple[NDArray[np.int64], NDArray[np.int64], Array]
"""Rows, columns and values of a sparse matrix."""


@dataclass(frozen=True)
class Relaxed:
    """An optimal relaxed plan: `bound_j` is proven; per instruction its start and duration."""

    bound_j: float
    starts_s: Array
    durations_s: Array
    step_s: float


@dataclass(frozen=True)
class Relaxation:
    """The program for every deadline: only the upper bound of the step's length changes."""

    program: Program
    constant_j: float
    first_s: Array
    segment_of: NDArray[np.int64]

    def solve(self, deadline_s: float) -> Relaxed:
        """Solve for one deadline.

        Raises:
            SolverLimitError: if the solver finds no plan though the deadline can be met.
        """
        count = len(self.first_s)
        upper = self.program.upper.copy()
        upper[count] = deadline_s
        result = solve_program(replace(self.program, upper=upper))
        if result.values is None:
            raise SolverLimitError(f"the relaxation for a deadline of {deadline_s:g} s ended {result.status}")
        durations = self.first_s.copy()
        np.add.at(durations, self.segment_of, result.values[count + 1 :])
        bound_j = result.bound + self.constant_j
        return Relaxed(bound_j, result.values[:count], durations, float(result.values[count]))


def lower_hull(times_s: Sequence[float], energies_j: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull's vertices; times ascend, energies descend."""
    hull: list[int] = []
    for i in range(len(times_s)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (energies_j[b] - energies_j[a]) * (times_s[i] - times_s[a]) < (energies_j[i] - energies_j[a]) * (
                times_s[b] - times_s[a]
            ):
                break
            hull.pop()
        hull.append(i)
    return hull


def relax(network: Network) -> Relaxation:
    """Fill the program's arrays."""
    count = len(network.order)
    first_s = np.array([times[0] for times in network.times_s])
    slopes, lengths, segment_of = _segments(network)
    (rows, columns, coefficients), row_lower = _rows(network, first_s, segment_of)
    program = Program(
        cost=np.concatenate([np.zeros(count), [network.waiting_w], slopes]),
        lower=np.concatenate([np.zeros(count), [network.least_step_s], np.zeros(len(slopes))]),
        upper=np.concatenate([np.full(count, math.inf), [math.inf], lengths]),
        integer=np.zeros(count + 1 + len(slopes), dtype=np.bool_),
        rows=rows,
        columns=columns,
        coefficients=coefficients,
        row_lower=row_lower,
        row_upper=np.full(len(row_lower), math.inf),
    )
    constant_j = math.fsum(energies[0] for energies in network.energies_j)
    return Relaxation(program, constant_j, first_s, segment_of)


def _segments(network: Network) -> tuple[Array, Array, NDArray[np.int64]]:
    """Slope (J/s), length (s) and instruction of every hull segment, in order of instructions."""
    slopes: list[float] = []
    lengths: list[float] = []
    owners: list[int] = []
    hulls: dict[tuple[tuple[float, ...], tuple[float, ...]], list[int]] = {}
    for v, (times, energies) in enumerate(zip(network.times_s, network.energies_j, strict=True)):
        hull = hulls.get((times, energies))
        if hull is None:
            hull = hulls[times, energies] = lower_hull(times, energies)
        for a, b in itertools.pairwise(hull):
            lengths.append(times[b] - times[a])
            slopes.append((energies[b] - energies[a]) / lengths[-1])
            owners.append(v)
    return np.array(slopes), np.array(lengths), np.array(owners, dtype=np.int64)


def _rows(network: Network, first_s: Array, segment_of: NDArray[np.int64]) -> tuple[Triples, Array]:
    """The matrix and its lower sides: a row per arc, and one to the step's end per instruction without successor."""
    count = len(first_s)
    arcs = [(v, w, delay) for v, after in enumerate(network.after) for w, delay in after]
    arcs += [(v, count, 0.0) for v, after in enumerate(network.after) if not after]
    bounds = np.searchsorted(segment_of, np.arange(count + 1))
    rows, columns, coefficients = [], [], []
    for row, (v, w, _) in enumerate(arcs):
        own = range(count + 1 + bounds[v], count + 1 + bounds[v + 1])
        rows += [row] * (2 + len(own))
        columns += [*sorted((v, w)), *own]
        coefficients += [*((-1.0, 1.0) if v < w else (1.0, -1.0)), *([-1.0] * len(own))]
    triples = (np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64), np.array(coefficients))
    return triples, np.array([first_s[v] + delay for v, _, delay in arcs])
