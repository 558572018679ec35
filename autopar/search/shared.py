"""Space: what all questions about one graph and cluster share: tables, problems, planes and plans met so far.

A question is an objective with limits (`aim`). Tables and problems do not depend on it, and neither do planes
a T + b D >= level that hold for every plan of a skeleton, nor the figures of a plan; so a frontier, a product
objective or a changed deadline pay for them once. A peak power limit is different: it takes strategies out of the
tables, so it belongs to the space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from autopar.ir.cost import CostEdge, CostNode, CostTable, Device, TableSource
from autopar.ir.mesh import stage_mesh
from autopar.ir.mixed import MixedSource
from autopar.search.aim import Plane
from autopar.search.cuts import Prices
from autopar.search.evaluate import Figures, Layout, fixed_power_w
from autopar.search.first import FirstBounds
from autopar.search.kinds import MixedIdeal
from autopar.search.optimist import Blocks
from autopar.search.problem import Problem, Weights, join_problems, make_problem
from autopar.search.ranges import Stack, make_stack
from autopar.search.space import FEW_TABLES, IdealBound, Skeleton, Skeletons

Entry = TypeVar("Entry", CostNode, CostEdge)
Progress = Callable[[dict[str, object]], None]
POWER_SLACK = 1e-9
"""Relative excess over the peak power limit that counts as rounding."""


@dataclass(frozen=True)
class Plan:
    """One evaluated plan, unpaced; `choice` indexes the table's strategies."""

    skeleton: Skeleton
    layout: Layout
    choice: tuple[int, ...]
    figures: Figures


@dataclass
class Space:
    """See the module docstring.

    Attributes:
        tolerance: relative gap that a question may leave.
        deadline_s: `time.monotonic` value at which the search stops, or None.
        planes: per skeleton, those that hold for all its plans.
        met: plans that no other of as many devices beats in both T and dynamic energy.
        ideal_scale, coarser_scale: <= 1; what a table contradicted the two assumed bounds by.
    """

    source: TableSource
    schedule: str
    tolerance: float
    skeletons: Skeletons
    deadline_s: float | None = None
    progress: Progress | None = None
    peak_power_w: float | None = None
    problems: dict[tuple[tuple[int, ...], int], Problem | None] = field(default_factory=dict)
    stacks: dict[tuple[tuple[int, ...], int], Stack | None] = field(default_factory=dict)
    leaves: dict[tuple[tuple[int, ...], int, int], Problem | None] = field(default_factory=dict)
    capped: dict[tuple[tuple[int, ...], int, int, int], Problem | None] = field(default_factory=dict)
    joints: dict[tuple[tuple[int, ...], int], Problem | None] = field(default_factory=dict)
    priced: dict[tuple[object, ...], tuple[Problem, Weights]] = field(default_factory=dict)
    parts: dict[int, Blocks] = field(default_factory=dict)
    planes: dict[Skeleton, list[Plane]] = field(default_factory=dict)
    met: list[Plan] = field(default_factory=list)
    offered: set[tuple[Skeleton, tuple[int, ...], Prices]] = field(default_factory=set)
    coarser: dict[tuple[Skeleton, Prices, int], float] = field(default_factory=dict)
    ideal: IdealBound | None = None
    first: FirstBounds | None = field(init=False, default=None)
    ideal_planes: dict[tuple[Skeleton, tuple[Prices, ...], float], tuple[Plane, ...]] = field(default_factory=dict)
    ideal_scale: float = 1.0
    coarser_scale: float = 1.0

    def __post_init__(self) -> None:
        mixed = self.mixed
        if self.skeletons.num_tables > FEW_TABLES:
            self.ideal = IdealBound(self.source) if mixed is None else MixedIdeal(mixed)
        if self.ideal is not None and mixed is None:
            self.first = FirstBounds(self.skeletons, self.ideal, float(self.device.memory_bytes), self.schedule)

    @property
    def device(self) -> Device:
        return self.source.device

    @property
    def out_of_time(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s

    @property
    def mixed(self) -> MixedSource | None:
        """The source where the cluster has several types."""
        return self.source if isinstance(self.source, MixedSource) else None

    def fixed_w(self, num_gpus: int, kinds: tuple[int, ...] = ()) -> float:
        """Blocked power of so many devices, evenly over stages of these types, and of their hosts."""
        if self.mixed is not None and kinds:
            return self.mixed.fixed_w(kinds, num_gpus // len(kinds))
        return fixed_power_w(self.device, num_gpus)

    def memory(self, skeleton: Skeleton) -> tuple[float, ...]:
        """Bytes of one device of every stage."""
        if self.mixed is not None and skeleton.kinds:
            return self.mixed.memory_bytes(skeleton.kinds)
        return (float(self.device.memory_bytes),) * skeleton.num_stages

    def base(self, sizes: tuple[int, ...], num_microbatches: int) -> Problem | None:
        """The problem of a table at the highest clock."""
        key = (sizes, num_microbatches)
        if key not in self.problems:
            table = self.source.table(stage_mesh(*sizes), num_microbatches)
            self.problems[key] = make_problem(table) if table is not None else None
        return self.problems[key]

    def stack(self, sizes: tuple[int, ...], num_microbatches: int) -> Stack | None:
        """The problem of a table at every clock."""
        key = (sizes, num_microbatches)
        if key not in self.stacks:
            problem = self.base(sizes, num_microbatches)
            figures = None if problem is None else self.source.clock_figures(stage_mesh(*sizes), num_microbatches)
            made = problem is not None and figures is not None
            self.stacks[key] = make_stack(problem, figures) if made else None  # type: ignore[arg-type]
        return self.stacks[key]

    def uncapped(self, sizes: tuple[int, ...], num_microbatches: int, clock: int = 0) -> Problem | None:
        """The problem at one clock, whatever its strategies draw."""
        if clock == 0:
            return self.base(sizes, num_microbatches)
        key = (sizes, num_microbatches, clock)
        if key not in self.leaves:
            stack = self.stack(sizes, num_microbatches)
            self.leaves[key] = stack.leaf(clock) if stack is not None else None
        return self.leaves[key]

    def problem(self, skeleton: Skeleton) -> Problem | None:
        """The problem of a leaf without what breaks the peak power limit; None: nothing is admissible."""
        if self.mixed is not None and skeleton.kinds:
            return self.joint(skeleton.sizes, skeleton.num_microbatches)
        first = skeleton.clocks[0]
        problem = self.uncapped(skeleton.sizes, skeleton.num_microbatches, first)
        if problem is None or self.peak_power_w is None:
            return problem
        key = (skeleton.sizes, skeleton.num_microbatches, skeleton.num_gpus, first)
        if key not in self.capped:
            free_w = self.peak_power_w - self.fixed_w(skeleton.num_gpus)
            self.capped[key] = below_power(problem, free_w / skeleton.num_gpus) if free_w >= 0 else None
        return self.capped[key]

    def joint(self, sizes: tuple[int, ...], num_microbatches: int) -> Problem | None:
        """The problem of all types of a mixed cluster."""
        key = (sizes, num_microbatches)
        if key not in self.joints and self.mixed is not None:
            tables = self.mixed.tables(stage_mesh(*sizes), num_microbatches) or ()
            parts = [problem for table in tables if (problem := make_problem(table)) is not None]
            self.joints[key] = join_problems(parts, self.mixed.links) if parts else None
        return self.joints[key]

    def blocks(self, problem: Problem) -> Blocks:
        return self.parts.setdefault(id(problem), Blocks(problem))

    def dynamic_j(self, plan: Plan) -> float:
        """Energy of a plan above the fixed power of its devices and hosts, joules per step."""
        fixed_w = self.fixed_w(plan.skeleton.num_gpus, plan.skeleton.kinds)
        return plan.figures.energy_j - fixed_w * plan.figures.time_s

    def record(self, plan: Plan) -> None:
        """Keep the plan unless one met beats it."""
        rank = (plan.figures.time_s, self.dynamic_j(plan))
        kept = []
        for other in self.met:
            if other.skeleton.num_gpus == plan.skeleton.num_gpus and other.skeleton.kinds == plan.skeleton.kinds:
                known = (other.figures.time_s, self.dynamic_j(other))
                if known[0] <= rank[0] and known[1] <= rank[1]:
                    return
                if rank[0] <= known[0] and rank[1] <= known[1]:
                    continue
            kept.append(other)
        self.met = [*kept, plan]


def below_power(problem: Problem, limit_w: float) -> Problem | None:
    """The problem without strategies and redistributions that draw more than `limit_w` on one device."""
    table = problem.table
    nodes = tuple(_without(node, limit_w) for node in table.nodes)
    edges = tuple(_without(edge, limit_w) for edge in table.edges)
    if all(a is b for a, b in zip((*nodes, *edges), (*table.nodes, *table.edges), strict=True)):
        return problem
    return make_problem(replace(table, nodes=nodes, edges=edges))


def _without(entry: Entry, limit_w: float) -> Entry:
    """`entry` with infinite time where its power is above the limit; itself if nowhere."""
    seconds = entry.forward_s + entry.backward_s
    hungry = np.isfinite(seconds) & (seconds > 0) & (entry.microbatch_j > seconds * limit_w * (1 + POWER_SLACK))
    return replace(entry, forward_s=np.where(hungry, np.inf, entry.forward_s)) if hungry.any() else entry


def peak_w(table: CostTable, choice: tuple[int, ...]) -> float:
    """Highest dynamic power of any op or redistribution of a choice, one device, watts."""
    highest = 0.0
    for node, p in zip(table.nodes, choice, strict=True):
        highest = max(highest, _power(node.microbatch_j[p], node.forward_s[p] + node.backward_s[p]))
    for edge in table.edges:
        at = choice[edge.source], choice[edge.target]
        highest = max(highest, _power(edge.microbatch_j[at], edge.forward_s[at] + edge.backward_s[at]))
    return highest


def _power(joules: float, seconds: float) -> float:
    return float(joules / seconds) if seconds > 0 and math.isfinite(seconds) else 0.0
