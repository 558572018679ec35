"""Untied: how much better plans could be if structurally identical blocks chose their strategies each for itself.

The search ties identical blocks: one node of a table stands for the same op in all of them. Its optimum is a plan of
the free problem too, hence an upper bound of it. The free problem is the search over `untied_table`s, in which every
block has nodes of its own:

    a node      is copied for each block that it occurs in (shared entries stay one: all stages compute the same)
    an edge     is copied for each pair (block of producer, block of consumer), between the copies of those blocks
    a crossing  belongs to the copy of its producer's block

The network of such a table is a long chain, so its elimination costs as many times a block's as there are blocks; the
bounds, and the choices on the way, are those of the search itself (`stages`, `refine`). Only skeletons whose bound is
below the tied answer are worked on: every bound of the free problem is one of the tied problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from autopar.ir.cost import ClockFigures, CostEdge, CostNode, CostTable, Crossing, Device, TableSource
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.solution import Solution
from autopar.search.optimist import Blocks
from autopar.search.problem import Problem
from autopar.search.shared import Space
from autopar.search.stages import Question


@dataclass(frozen=True)
class Untied:
    """bound <= optimum of the untied problem <= value <= the tied answer's value."""

    value: float
    bound: float


def untied_table(table: CostTable) -> CostTable:
    """The table with nodes of its own for every block, by node and then by block."""
    position: dict[tuple[int, int], int] = {}
    nodes: list[CostNode] = []
    for index, node in enumerate(table.nodes):
        for block in dict.fromkeys(node.blocks):
            position[index, block] = len(nodes)
            names = tuple(name for b, name in zip(node.blocks, node.names, strict=True) if b == block)
            nodes.append(replace(node, blocks=(block,) * len(names), names=names))
    edges = tuple(copy for edge in table.edges for copy in _copies(edge, position))
    crossings = tuple(replace(c, node=_home(position, c)) for c in table.crossings)
    return replace(table, nodes=tuple(nodes), edges=edges, crossings=crossings)


def _copies(edge: CostEdge, position: dict[tuple[int, int], int]) -> list[CostEdge]:
    """One edge per pair of blocks, with all that the pair pays."""
    paid: dict[tuple[int, int], list[int]] = {}
    for pair, block in zip(edge.cut_pairs, edge.blocks, strict=True):
        paid.setdefault(pair, []).append(block)
    return [
        replace(
            edge,
            source=position[edge.source, pair[0]],
            target=position[edge.target, pair[1]],
            blocks=tuple(blocks),
            cut_pairs=(pair,) * len(blocks),
        )
        for pair, blocks in paid.items()
    ]


def _home(position: dict[tuple[int, int], int], crossing: Crossing) -> int:
    return position[crossing.node, crossing.producer_block]


@dataclass(frozen=True)
class UntiedSource:
    """A table source whose tables are untied; see `ir.cost.TableSource`."""

    source: TableSource
    made: dict[tuple[StageMesh, int], CostTable | None] = field(default_factory=dict)

    @property
    def graph(self) -> OpGraph:
        return self.source.graph

    @property
    def device(self) -> Device:
        return self.source.device

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return self.source.clocks_hz

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        table = self.source.table(mesh, num_microbatches)
        return None if table is None else untied_table(table)

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        table = self.source.table(mesh, num_microbatches)
        figures = self.source.clock_figures(mesh, num_microbatches)
        if table is None or figures is None:
            return None
        at, start = [], 0
        for node in table.nodes:
            stop = start + len(node.choices)
            at += [np.arange(start, stop)] * len(set(node.blocks))
            start = stop
        columns = np.concatenate(at)
        return ClockFigures(
            figures.forward_s[:, columns], figures.backward_s[:, columns], figures.microbatch_j[:, columns]
        )


class UntiedBlocks(Blocks):
    """Copies of the same block share their work: they have the same nodes, and edges with the same prices."""

    def key(self, block: int) -> object:
        table = self.problem.table
        inside = [n.name for n in table.nodes for b in n.blocks if b == block]
        edges = []
        for edge in table.edges:
            if block in edge.blocks:
                ends = table.nodes[edge.source], table.nodes[edge.target]
                own = tuple((end.name, block in end.blocks) for end in ends)
                edges.append((*own, id(edge.forward_s), len(edge.blocks)))
        return tuple(inside), tuple(edges)


class _UntiedSpace(Space):
    def blocks(self, problem: Problem) -> Blocks:
        return self.parts.setdefault(id(problem), UntiedBlocks(problem))


def untie(space: Space, question: Question, most_layouts: int | None = None) -> Untied:
    """The untied problem of an answered question, over the same skeletons and under the same limits.

    Args:
        most_layouts: skeletons whose layouts are closed at most; None: all.
    """
    free = _untied_space(space)
    freed = Question(free, question.objective, question.limits, most_layouts=most_layouts, value=question.value)
    if question.plan is not None:
        plan = question.plan
        skeleton = plan.skeleton
        problem = space.uncapped(skeleton.sizes, skeleton.num_microbatches, skeleton.clocks[0])
        if problem is not None:
            nodes = problem.table.nodes
            copies = [p for node, p in zip(nodes, plan.choice, strict=True) for _ in dict.fromkeys(node.blocks)]
            free.met.append(replace(plan, choice=tuple(copies)))
    answer = freed.run()
    return Untied(answer.value, max(answer.bound, 0.0))


def untied_bound(space: Space, question: Question) -> float:
    """A lower bound of an answered question's objective with blocks untied."""
    return untie(space, question).bound


def further_gap(solution: Solution, bound: float) -> float:
    """What a bound of the untied problem adds to a solution's gap."""
    value = abs(solution.objective_value)
    return max(solution.bound - bound, 0.0) / value if value else 0.0


def _untied_space(space: Space) -> Space:
    free = _UntiedSpace(
        UntiedSource(space.source),
        space.schedule,
        space.tolerance,
        space.skeletons,
        deadline_s=space.deadline_s,
        peak_power_w=space.peak_power_w,
        ideal_scale=space.ideal_scale,
        coarser_scale=space.coarser_scale,
    )
    free.ideal, free.first = space.ideal, space.first
    return free
