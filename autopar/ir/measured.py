"""MeasuredStep: what a run on this machine says of a step of a plan, and the energy of a step of another length."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir.quantity import Quantity, weaker_label


@dataclass(frozen=True)
class MeasuredStep:
    """A step as it was run.

    Attributes:
        num_processes: that ran it.
        num_steps: that count.
        step_time_s: median, with the range seen.
        energy_j: as a counter read it, or modelled at the time measured; its label says which.
        average_power_w: energy over time.
        notes: what the reader must know to trust the figures.
    """

    num_processes: int
    num_steps: int
    step_time_s: Quantity
    energy_j: Quantity
    average_power_w: Quantity
    notes: tuple[str, ...]


def energy_of(dynamic_j: float, fixed_w: float, time_s: Quantity, half_width: float) -> Quantity:
    """Modelled energy of a step that took this long: some per step, and power drawn throughout.

    Args:
        half_width: uncertainty of the powers, as a share.
    """
    value, low, high = (dynamic_j + fixed_w * seconds for seconds in (time_s.value, time_s.low, time_s.high))
    return Quantity(value, "J", "modelled", low * (1 - half_width), high * (1 + half_width))


def power_of(energy_j: Quantity, time_s: Quantity) -> Quantity:
    """Average power; as certain as the less certain of both."""
    value = energy_j.value / time_s.value
    low, high = min(value, energy_j.low / time_s.high), max(value, energy_j.high / time_s.low)
    return Quantity(value, "W", weaker_label(energy_j.label, time_s.label), low, high)
