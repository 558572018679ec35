"""Savings: how the energy of a plan came down from that of the plan of least time, one freedom after the other."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir.quantity import Quantity

PARALLELISATION, NUM_GPUS, STAGE_CLOCKS, CLOCKS = "parallelisation", "number of GPUs", "clocks", "clocks, further"
"""What is chosen by energy: how the model is split, on how many GPUs, one clock per stage, one per instruction."""


@dataclass(frozen=True, slots=True)
class SavingStep:
    """A plan on the way.

    Attributes:
        cause: what is free from here on, beside what was before.
        description: mesh, stages, microbatches and locked clocks.
        step_time_s, energy_j: GPUs and hosts, as every prediction; None: there is no such plan.
        saved_j: energy of the last plan before it, less its own.
        reason: why there is no such plan; "" otherwise.
    """

    cause: str
    description: str
    num_gpus: int
    step_time_s: Quantity | None
    energy_j: Quantity | None
    saved_j: float
    reason: str = ""


@dataclass(frozen=True)
class Savings:
    """The way from the plan of least time to the plan asked about, and beyond.

    Attributes:
        objective: kind of the objective by which the plan was found.
        fastest: the plan of least time under the same limits.
        steps: by cause; the last but `beyond` is the plan asked about.
        beyond: the plan with a clock per instruction, within its own step time; None where clocks cannot be locked.
        alone: a clock per instruction on the plan of least time: within its own step time, and within that of the plan
            asked about.
        remarks: what the reader should know.
    """

    objective: str
    fastest: SavingStep
    steps: tuple[SavingStep, ...]
    beyond: SavingStep | None
    alone: tuple[SavingStep, ...]
    remarks: tuple[str, ...] = ()

    @property
    def plan(self) -> SavingStep:
        """The plan asked about."""
        return self.steps[-1]

    @property
    def saved_j(self) -> float:
        """By the plan asked about, against the plan of least time."""
        return sum(step.saved_j for step in self.steps)
