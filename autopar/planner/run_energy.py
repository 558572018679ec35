"""Energy of a run: what meters read, and a labelled figure in place of everything that they did not.

    GPUs    counter, else integrated power, else the plan's power of GPUs times the measured time: modelled
    hosts   RAPL, else the plan's constant per node times the measured time: assumed
    CPU     where no GPU is used: RAPL, else the power of the built-in CPU times the measured time: assumed

The sum carries the weakest label of its parts. It never is a zero, and never silently of fewer devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cost.hardware import load_cluster
from autopar.cost.power import stage_w
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity, weaker_label
from autopar.meters import NodeReading, Reading
from autopar.units import format_joules

CONSTANT_ERROR = 0.5
"""Assumed relative error of a host's constant power."""


@dataclass(frozen=True)
class Window:
    """What a run measured energy over: steps of `step_s` seconds each, on so many nodes; `reading` of all of them."""

    reading: NodeReading | None
    num_steps: int
    num_nodes: int
    step_s: float
    uses_gpus: bool


@dataclass(frozen=True)
class RunEnergy:
    """Joules of one step.

    Attributes:
        total: over all parts.
        parts: by what they cover: `GPUs` and `hosts`, or `CPU packages`, or `CPU`.
        notes: sources, scopes and reasons.
    """

    total: Quantity
    parts: Mapping[str, Quantity]
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The parts with their labels, for people."""
        return " + ".join(f"{name} {format_joules(part.value)} {part.label}" for name, part in self.parts.items())


def run_energy(plan: Plan, window: Window) -> RunEnergy:
    """Energy of a step of a run of this plan."""
    reading = window.reading
    parts: dict[str, Quantity] = {}
    notes: list[str] = []

    def take(name: str, found: Reading | None, instead: Quantity, words: str) -> None:
        if found is not None and found.value_j is not None:
            parts[name] = _measured(found, window.num_steps)
            reason = f" ({found.reason})" if found.reason else ""
            notes.append(f"energy of {name}: {found.source}, scope {found.scope}, {found.window_s:.3g} s{reason}")
        else:
            parts[name] = instead
            why = "no meter" if found is None else found.reason
            notes.append(f"energy of {name} is not measured ({why}): {instead.label}, {words}")

    if window.uses_gpus:
        words = "the plan's power of its GPUs times the measured time"
        take("GPUs", None if reading is None else reading.gpu, _planned(plan, window.step_s), words)
        constant = _constant(plan, window.step_s)
        take(
            "hosts", None if reading is None else reading.host, constant, "a constant per node times the measured time"
        )
    elif reading is not None and reading.host.value_j is not None:
        take("CPU packages", reading.host, _cpu(plan, window), "")
    else:
        words = "power of the built-in CPU's device file times the measured time"
        take("CPU", None if reading is None else reading.host, _cpu(plan, window), words)
    label = "measured"
    for part in parts.values():
        label = weaker_label(label, part.label)
    sums = [sum(getattr(part, name) for part in parts.values()) for name in ("value", "low", "high")]
    return RunEnergy(Quantity(sums[0], "J", label, sums[1], sums[2]), parts, tuple(notes))


def _measured(found: Reading, num_steps: int) -> Quantity:
    value = found.value_j or 0.0
    low = value if found.low_j is None else found.low_j
    high = value if found.high_j is None else found.high_j
    label = found.label if found.label in ("modelled", "assumed") else "measured"
    return Quantity(value / num_steps, "J", label, low / num_steps, high / num_steps)


def _planned(plan: Plan, step_s: float) -> Quantity:
    """Power of the GPUs that the plan predicts, for as long as the step really took."""
    predicted = plan.predicted
    energy = predicted.energy_j
    gpus_j = energy.value - predicted.energy_by_cause.get("host", 0.0)
    value = gpus_j / predicted.step_time_s.value * step_s
    label = weaker_label("modelled", energy.label)
    return Quantity(value, "J", label, value * energy.low / energy.value, value * energy.high / energy.value)


def _constant(plan: Plan, step_s: float) -> Quantity:
    """Power of the hosts that the plan assumes, likewise."""
    predicted = plan.predicted
    return _around(predicted.energy_by_cause.get("host", 0.0) / predicted.step_time_s.value * step_s, CONSTANT_ERROR)


def _cpu(plan: Plan, window: Window) -> Quantity:
    cluster = load_cluster("cpu", plan.decisions.num_gpus)
    watts = stage_w(cluster.spec) * cluster.num_gpus + cluster.host_w_per_node * window.num_nodes
    return _around(watts * window.step_s, cluster.spec.energy_uncertainty)


def _around(value: float, error: float) -> Quantity:
    return Quantity(value, "J", "assumed", value * (1 - error), value * (1 + error))
