"""The same problem for CP-SAT: graphs with too many down-sets to list.

Positions 1..k+m take the devices in order; y_p says that position p is a CPU. z_{u,p}: unit u stands at position p or
before, so z_{u,p} <= z_{v,p} for an order edge (v, u), z_{u,p} <= z_{u,p+1}, and x_{u,p} = z_{u,p} - z_{u,p-1}.
Transfers: w_{e,p} >= x_{u,p} - x_{v,p} for neighbours u, v in a cyclic order of net e. Times are scaled to integers and
rounded down, so that the bound stays a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from autopar.search.partition.contract import Contracted
from autopar.search.partition.dynamic import Cut, Devices, Outcome, simple_bound_s
from autopar.search.solver import IntegerModel, solve_integers

SMALLEST_SHARE = 1e-5
"""Times below this share of the simple bound need no accuracy of their own."""
SMALLEST_WEIGHT = 1e4


@dataclass
class _Builder:
    """Columns and rows of the model as they are added."""

    graph: Contracted
    devices: Devices
    scale: float
    model: IntegerModel = field(default_factory=IntegerModel)
    at: dict[tuple[int, int], int] = field(default_factory=dict)
    cpu: list[int] = field(default_factory=list)

    @property
    def num_positions(self) -> int:
        return self.devices.num_accelerators + self.devices.num_cpus

    def scaled(self, value_s: float) -> int:
        return math.floor(value_s * self.scale)

    def build(self, ceiling_s: float) -> None:
        """Add everything; the objective is the largest load."""
        model = self.model
        ceiling = math.ceil(ceiling_s * self.scale)
        load = model.variable(0, ceiling)
        cpu = self.cpu = [model.variable(0, 1) for _ in range(self.num_positions)]
        model.row([(column, 1) for column in cpu], 0, self.devices.num_cpus)
        model.row(
            [(column, -1) for column in cpu], -self.num_positions, self.devices.num_accelerators - self.num_positions
        )
        self._contiguity()
        for position in range(self.num_positions):
            self._accelerator(position, cpu[position], load)
            self._cpu(position, cpu[position], load)
        model.objective = load

    def _contiguity(self) -> None:
        model, last = self.model, self.num_positions - 1
        until: dict[tuple[int, int], int] = {}
        for unit, before in enumerate(self.graph.predecessors):
            for position in range(self.num_positions):
                until[unit, position] = model.variable(int(position == last), 1)
                terms = [(until[unit, position], 1)]
                if position:
                    model.row([(until[unit, position - 1], 1), (until[unit, position], -1)], -1, 0)
                    terms.append((until[unit, position - 1], -1))
                for p in before:
                    model.row([(until[unit, position], 1), (until[p, position], -1)], -1, 0)
                self.at[unit, position] = model.variable(0, 1)
                model.row([*terms, (self.at[unit, position], -1)], 0, 0)

    def _accelerator(self, position: int, cpu: int, load: int) -> None:
        model, units = self.model, self.graph.units
        terms = [(self.at[u, position], self.scaled(unit.accelerator_s or 0.0)) for u, unit in enumerate(units)]
        for net, cost_s in self.graph.nets:
            cut = model.variable(0, 1)
            for one, other in zip(net, (*net[1:], net[0]), strict=True):
                model.row([(self.at[one, position], 1), (self.at[other, position], -1), (cut, -1)], -2, 0)
            terms.append((cut, self.scaled(cost_s)))
        model.row([*((c, w) for c, w in terms if w), (load, -1)], None, 0, unless=cpu)
        for u, unit in enumerate(units):
            if unit.accelerator_s is None:
                model.row([(self.at[u, position], 1), (cpu, -1)], -1, 0)
        if sum(unit.size_bytes for unit in units) > self.devices.memory_bytes:
            # Whole bytes, rounded down: a relaxation by less than a byte per unit, which the caller re-checks.
            sizes = [(self.at[u, position], math.floor(unit.size_bytes)) for u, unit in enumerate(units)]
            model.row([(c, w) for c, w in sizes if w], None, math.floor(self.devices.memory_bytes), unless=cpu)

    def _cpu(self, position: int, cpu: int, load: int) -> None:
        terms = [(self.at[u, position], self.scaled(unit.cpu_s)) for u, unit in enumerate(self.graph.units)]
        self.model.row([*((c, w) for c, w in terms if w), (load, -1)], None, 0, when=cpu)


def general_partition(
    graph: Contracted, devices: Devices, incumbent: tuple[Cut, ...] | None, *, ceiling_s: float, time_limit_s: float
) -> Outcome:
    """The best partition with a largest load of at most `ceiling_s`, its cuts in order, and a bound on any.

    Args:
        incumbent: cuts to start from.
    """
    reference_s = simple_bound_s(graph, devices) or math.fsum(cost for _, cost in graph.nets) or 1.0
    builder = _Builder(graph, devices, SMALLEST_WEIGHT / (SMALLEST_SHARE * reference_s))
    builder.build(ceiling_s)
    for index, (is_cpu, mask) in enumerate(incumbent or ()):
        builder.model.hint[builder.cpu[index]] = int(is_cpu)
        for unit in range(len(graph.units)):
            builder.model.hint[builder.at[unit, index]] = mask >> unit & 1
    result = solve_integers(builder.model, time_limit_s=time_limit_s)
    if result.status == "infeasible":
        return Outcome(None, math.inf, ceiling_s if incumbent else math.inf, True)
    bound_s = max(0.0, result.bound / builder.scale)
    if result.values is None:
        return Outcome(None, math.inf, bound_s, False)
    values = result.values
    cuts = []
    for position in range(builder.num_positions):
        mask = sum(1 << u for u in range(len(graph.units)) if values[builder.at[u, position]])
        if mask:
            cuts.append((bool(values[builder.cpu[position]]), mask))
    return Outcome(tuple(cuts), result.objective / builder.scale, bound_s, result.status == "optimal")
