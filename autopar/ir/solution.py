"""Solution: what a search decided and how sure it is that nothing better exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.ir.mesh import StageMesh
from autopar.ir.placement import Sharding
from autopar.ir.strategy import ParameterStrategy, Strategy

RECOMPUTE = ("none", "full")
OBJECTIVES = ("time", "energy", "edp", "weighted")
STATUSES = ("optimal", "feasible", "infeasible", "no-solution")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: `time` (s), `energy` (J), `edp` (J s), or `weighted` = time_weight * s + energy_weight * J."""

    kind: str
    time_weight: float = 0.0
    energy_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.kind!r}")

    def value(self, time_s: float, energy_j: float) -> float:
        if self.kind == "time":
            return time_s
        if self.kind == "energy":
            return energy_j
        if self.kind == "edp":
            return time_s * energy_j
        return self.time_weight * time_s + self.energy_weight * energy_j


@dataclass(frozen=True, slots=True)
class Pins:
    """User restrictions of the space; None leaves a choice free.

    `dp` and `tp` fix the stage mesh to (dp, tp) and restrict every op: on the dp axis only batch splits (and
    parameter storage), on the tp axis everything but batch splits.
    """

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    num_microbatches: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    zero: int | None = None


@dataclass(frozen=True, slots=True)
class StageChoice:
    """Blocks `start..stop-1` on one stage."""

    start: int
    stop: int
    recompute: str


@dataclass(frozen=True)
class Alternative:
    """A skeleton that the search looked at: its best figures (formula, not simulated) or why it fell out."""

    description: str
    time_s: float | None
    energy_j: float | None
    objective: float | None
    bound: float | None
    reason: str


@dataclass(frozen=True)
class Decisions:
    """Everything that turns a graph into a distributed program.

    Attributes:
        ops: strategy of every op, by op name.
        hubs: placement in which a value read by several ops is kept, by value name.
        parameters: how each parameter is stored, by value name.
    """

    mesh: StageMesh
    num_microbatches: int
    schedule: str
    stages: tuple[StageChoice, ...]
    ops: Mapping[str, Strategy]
    hubs: Mapping[str, Sharding]
    parameters: Mapping[str, ParameterStrategy]

    @property
    def num_gpus(self) -> int:
        return self.mesh.num_devices * len(self.stages)


@dataclass(frozen=True)
class Solution:
    """Decisions with their formula values (`ir.pipeline`); the planner re-times them by simulation.

    Attributes:
        objective_value, bound: in the objective's unit; bound <= optimum of the searched space <= objective_value.
        status: one of STATUSES; `optimal` only if the gap is below the tolerance asked for.
        gap_parts: where a remaining gap comes from.
    """

    decisions: Decisions
    time_s: float
    energy_j: float
    objective: Objective
    objective_value: float
    bound: float
    status: str
    solver: str
    wall_s: float
    alternatives: tuple[Alternative, ...] = ()
    gap_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|, 0 for an objective of 0."""
        return (self.objective_value - self.bound) / abs(self.objective_value) if self.objective_value else 0.0
