"""Energy of a run: what meters read, and a labelled figure in place of everything that they did not.

    GPUs    counter, else integrated power, else the plan's joules of computing and watts of waiting at the measured
            time: modelled, or assumed on GPUs of another type than the plan's
    hosts   RAPL, else the plan's constant per node times the measured time: assumed
    CPU     where no GPU is used: RAPL, else the plan's figures likewise; of a plan for GPUs, the power of the built-in
            CPU times the measured time: assumed

The sum carries the weakest label of its parts. It never is a zero, and never silently of fewer devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.cost.hardware import load_cluster
from autopar.cost.power import stage_w
from autopar.ir.measured import energy_of
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity, weaker_label
from autopar.meters import NodeReading, Reading
from autopar.planner.detect import kebab_name
from autopar.units import format_joules

CONSTANT_ERROR = 0.5
"""Assumed relative error of a host's constant power."""
GPU_CAUSES, HOST_CAUSES = ("dynamic", "blocked"), ("host",)
CPU = "cpu"


@dataclass(frozen=True)
class Window:
    """What a run measured energy over: steps on so many nodes.

    Attributes:
        reading: of all nodes.
        device: product name of the GPUs, or `cpu`.
    """

    reading: NodeReading | None
    num_steps: int
    num_nodes: int
    step_time: Quantity
    device: str


@dataclass(frozen=True)
class RunEnergy:
    """Joules of one step.

    Attributes:
        total: over all parts.
        parts: by what they cover: `GPUs` and `hosts`, or `CPUs`.
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

    gpu, host = (None, None) if reading is None else (reading.gpu, reading.host)
    if window.device != CPU:
        is_planned = kebab_name(window.device) in plan.cluster.gpu.split(" + ")
        of = "its GPUs" if is_planned else f"{plan.cluster.gpu}, which these are not,"
        own = _planned(plan, window.step_time, GPU_CAUSES)
        take("GPUs", gpu, own if is_planned else _assumed(own), f"the plan's power of {of} at the measured time")
        constant = _around(_planned(plan, window.step_time, HOST_CAUSES).value, CONSTANT_ERROR)
        take("hosts", host, constant, "a constant per node times the measured time")
    elif plan.cluster.gpu == CPU:
        own = _planned(plan, window.step_time, (*GPU_CAUSES, *HOST_CAUSES))
        take("CPUs", host, own, "the plan's power at the measured time")
    else:
        take("CPUs", host, _cpu(plan, window), "power of the built-in CPU's device file times the measured time")
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


def _planned(plan: Plan, time: Quantity, causes: tuple[str, ...]) -> Quantity:
    """The plan's figure for a step of another length: computing takes the same energy, all else the same power."""
    predicted = plan.predicted
    by_cause = {cause: predicted.energy_by_cause.get(cause, 0.0) for cause in causes}
    dynamic_j = by_cause.pop("dynamic", 0.0)
    fixed_w = sum(by_cause.values()) / predicted.step_time_s.value
    wide = predicted.energy_j.high / predicted.energy_j.value - 1
    found = energy_of(dynamic_j, fixed_w, time, wide)
    return replace(found, label=weaker_label(found.label, predicted.energy_j.label))


def _assumed(quantity: Quantity) -> Quantity:
    return replace(quantity, label="assumed")


def _cpu(plan: Plan, window: Window) -> Quantity:
    cluster = load_cluster("cpu", plan.decisions.num_gpus)
    watts = stage_w(cluster.spec) * cluster.num_gpus + cluster.host_w_per_node * window.num_nodes
    return _around(watts * window.step_time.value, cluster.spec.energy_uncertainty)


def _around(value: float, error: float) -> Quantity:
    return Quantity(value, "J", "assumed", value * (1 - error), value * (1 + error))
