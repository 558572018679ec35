"""Study: a model under several policies (`ir.sync`) and numbers of workers, priced and perhaps run, against serial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.ir.measured import power_of
from autopar.ir.quantity import Quantity
from autopar.ir.sync import SyncPolicy, SyncPrice, SyncRun


@dataclass(frozen=True)
class StudyCase:
    """One policy on one number of workers.

    Attributes:
        price, run: None where there is none; `reason` and `not_run` say why ("": nobody asked).
    """

    policy: SyncPolicy
    num_workers: int
    price: SyncPrice | None = None
    run: SyncRun | None = None
    reason: str = ""
    not_run: str = ""

    @property
    def num_processes(self) -> int:
        return self.policy.num_processes(self.num_workers)

    @property
    def run_energy(self) -> Quantity | None:
        """Of a step that was run: as measured, else modelled at the time measured; its label says which."""
        if self.run is None or self.run.energy is not None:
            return None if self.run is None else self.run.energy
        return None if self.price is None else self.price.energy_at(self.run.step_time)

    @property
    def run_power(self) -> Quantity | None:
        """Average over the steps that were run."""
        energy = self.run_energy
        if energy is None or self.run is None:
            return None
        return power_of(energy, self.run.step_time)

    @property
    def priced_figures(self) -> tuple[float, float] | None:
        """Seconds and joules of a step, predicted."""
        return None if self.price is None else (self.price.step_time_s.value, self.price.energy_j.value)

    @property
    def run_figures(self) -> tuple[float, float] | None:
        """Seconds and joules of a step that was run."""
        energy = self.run_energy
        return None if self.run is None or energy is None else (self.run.step_time.value, energy.value)


Figures = Callable[[StudyCase], "tuple[float, float] | None"]
"""Seconds and joules of a case: `StudyCase.priced_figures` or `run_figures`."""


def is_alone(case: StudyCase) -> bool:
    """One worker that exchanges nothing: serial, whatever the policy."""
    return case.num_workers == 1 and not case.policy.has_server


@dataclass(frozen=True)
class BreakEven:
    """Where more workers stop paying, of one policy, among the numbers of workers that were studied.

    Attributes:
        least_energy: number of workers at the least energy.
        cheaper_up_to: largest number of workers that takes less energy than serial; None: none does.
        fastest: number of workers at the least time.
    """

    policy: SyncPolicy
    least_energy: int
    cheaper_up_to: int | None
    fastest: int


@dataclass(frozen=True)
class Study:
    """Cases in the order asked for.

    Attributes:
        title: what was studied.
        device: name in `costmodels/` of what the prices are for.
        batch_size: samples of a step, of all workers together.
        notes: sentences for the reader.
    """

    title: str
    device: str
    batch_size: int
    cases: tuple[StudyCase, ...]
    notes: tuple[str, ...] = ()

    @property
    def policies(self) -> tuple[SyncPolicy, ...]:
        return tuple(dict.fromkeys(case.policy for case in self.cases))

    @property
    def serial(self) -> StudyCase | None:
        """The case of one worker without server, if it was studied."""
        return next((case for case in self.cases if is_alone(case)), None)

    def against_serial(self, case: StudyCase, figures: Figures) -> tuple[float, float] | None:
        """Speed-up, and energy over that of serial."""
        own, base = figures(case), None if self.serial is None else figures(self.serial)
        return None if own is None or base is None else (base[0] / own[0], own[1] / base[1])

    def break_even(self, policy: SyncPolicy, figures: Figures) -> BreakEven | None:
        """Of a policy's cases with figures, serial included; None with fewer than two."""
        base = None if self.serial is None else figures(self.serial)
        found = {c.num_workers: figures(c) for c in self.cases if c.policy == policy}
        known = {count: figure for count, figure in found.items() if figure is not None}
        if base is not None:
            known[1] = min(base, known.get(1, base), key=lambda figure: figure[1])
        if len(known) < 2 or base is None:
            return None
        cheaper = [count for count, (_, joules) in known.items() if count > 1 and joules < base[1]]
        return BreakEven(
            policy,
            min(known, key=lambda count: (known[count][1], count)),
            max(cheaper, default=None),
            min(known, key=lambda count: (known[count][0], count)),
        )
