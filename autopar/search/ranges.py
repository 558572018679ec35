"""Ranges of clocks: all clocks of a skeleton bounded by one network, in which every strategy takes its own best clock.

For a direction a T + b D the additive part of the objective is a sum over entries of w t_c + b e_c with one weight w of
time, so that

    min over clocks c of sum_i (w t_ic + b e_ic)   >=   sum_i min over c of (w t_ic + b e_ic)

and the right side is a pairwise network like any other (redistributions do not depend on the clock). What it gives
away is that ops bound by memory would like lower clocks than those bound by compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autopar.ir.cost import Array, ClockFigures
from autopar.search.problem import (
    ENERGY,
    NUM_CHANNELS,
    NUM_WEIGHTS,
    REDO,
    REDO_ENERGY,
    STATE,
    TIME,
    Problem,
    Weights,
    pay_values,
)

OWN, SHARED_PAY = TIME, REDO
"""Channels of a priced problem: what own entries pay, and what shared ones pay."""


@dataclass(frozen=True)
class Stack:
    """A problem at every clock: `values` [clock, channel, strategy] are its four channels of time and energy."""

    problem: Problem
    figures: ClockFigures
    values: Array

    def leaf(self, clock: int) -> Problem:
        """The problem at one clock."""
        values = self.problem.values.copy()
        values[[TIME, REDO, ENERGY, REDO_ENERGY]] = self.values[clock]
        return replace(self.problem, table=self.figures.at(self.problem.table, clock), values=values, cache={})


def make_stack(problem: Problem, figures: ClockFigures) -> Stack:
    """`figures` are those of the problem's table."""
    counts = [len(node.choices) for node in problem.table.nodes]
    starts = np.concatenate([[0], np.cumsum(counts)])
    at = np.concatenate([starts[i] + kept for i, kept in enumerate(problem.kept)])
    chosen = list(zip(problem.table.nodes, problem.kept, strict=True))
    values = pay_values(
        problem.table,
        figures.forward_s[:, at],
        figures.backward_s[:, at],
        figures.microbatch_j[:, at],
        step_s=np.concatenate([node.step_s[kept] for node, kept in chosen]),
        step_j=np.concatenate([node.step_j[kept] for node, kept in chosen]),
    )
    return Stack(problem, figures, np.moveaxis(values, 0, 1))


@dataclass(frozen=True)
class PricedRange:
    """A range of clocks in one direction.

    Attributes:
        problem: its channels OWN and SHARED_PAY hold the least pay over the range; those of memory are unchanged.
        own, shared: pay at each clock of the range, [clock, strategy].
    """

    problem: Problem
    own: Array
    shared: Array
    num_stages: int

    def weights(self, constant: float) -> Weights:
        blocks = np.zeros((self.problem.num_blocks + 1, NUM_WEIGHTS))
        blocks[:-1, OWN] = 1.0
        blocks[-1, SHARED_PAY] = self.num_stages
        return Weights(blocks, constant=constant)

    def best_clock(self, choice: tuple[int, ...]) -> int:
        """Clock of the range, from its start, at which a choice pays least."""
        at = self.problem.offsets[:-1] + np.asarray(choice, dtype=np.int64)
        count = self.problem.node_count
        pay = self.own[:, at] @ count[:, :-1].sum(axis=1) + self.num_stages * (self.shared[:, at] @ count[:, -1])
        return int(np.argmin(pay))


def price_range(
    stack: Stack, clocks: tuple[int, int], num_stages: int, *, time_weight: float, beta: float, redo: bool
) -> PricedRange:
    """`time_weight` per second, `beta` per joule of every entry; `redo`: own entries compute forward again."""
    problem, span = stack.problem, stack.values[clocks[0] : clocks[1] + 1]
    shared = time_weight * span[:, 0] + beta * span[:, 2]
    own = shared + (time_weight * span[:, 1] + beta * span[:, 3] if redo else 0.0)
    values = np.zeros((NUM_CHANNELS, problem.values.shape[1]))
    values[STATE:] = problem.values[STATE:]
    values[OWN], values[SHARED_PAY] = own.min(axis=0), shared.min(axis=0)
    edges = np.zeros_like(problem.edge_values)
    edges[SHARED_PAY] = time_weight * problem.edge_values[TIME] + beta * problem.edge_values[ENERGY]
    again = time_weight * problem.edge_values[REDO] + beta * problem.edge_values[REDO_ENERGY]
    edges[OWN] = edges[SHARED_PAY] + (again if redo else 0.0)
    return PricedRange(replace(problem, values=values, edge_values=edges, cache={}), own, shared, num_stages)
