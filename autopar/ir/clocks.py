"""Clocks of the instructions of a pipeline step, as planned: what `autopar clocks` prints and writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClockPoint:
    """A step within one deadline: bound_j <= least energy <= energy_j, of GPUs and hosts but for sends."""

    deadline_s: float
    makespan_s: float
    energy_j: float
    bound_j: float


@dataclass(frozen=True, slots=True)
class StageClocks:
    """Clocks of one stage's forwards or backwards, in the order of its schedule; `microbatches` likewise."""

    stage: int
    kind: str
    microbatches: tuple[int, ...]
    clocks_mhz: tuple[float, ...]


@dataclass(frozen=True)
class ClockedStep:
    """A plan's step with a clock for every instruction.

    Attributes:
        fastest_s, highest_j: step at the highest clocks; behind a straggler, joules of waiting for it included.
        own_s, own_j: step at the plan's own clocks, likewise.
        straggler_s: the step does not end before; 0: nobody outside is waited for.
        slow_rank: the pipeline rank that takes `slow_ratio` times as long as it should; None: no rank does.
        chosen, stages: within the deadline asked for.
        points: one per deadline, ascending.
        time_range, energy_range: (low, high) of the plan's predicted figures over their values; they hold here too.
    """

    num_gpus: int
    num_instructions: int
    fastest_s: float
    highest_j: float
    own_s: float
    own_j: float
    straggler_s: float
    slow_rank: int | None
    slow_ratio: float
    chosen: ClockPoint
    stages: tuple[StageClocks, ...]
    points: tuple[ClockPoint, ...]
    time_range: tuple[float, float]
    energy_range: tuple[float, float]
