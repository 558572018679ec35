"""The exact dynamic program over ideals, by rising thresholds.

value[c][a][J] = the smallest largest load of a partition of ideal J over c CPUs and a accelerators:

    value[c][a][J] = min over ideals I within J of  min( max(value[c][a-1][I], load(J - I)),
                                                         max(value[c-1][a][I], cpu(J - I)) )

A pass looks only for values at or below a threshold. Ideals from which the devices left cannot finish within the
threshold are skipped: what remains needs its accelerator time, less what CPUs can take off within the threshold, and,
if no CPU is left, the transfers of every net that is cut now. A pass that finds nothing proves the threshold a lower
bound; the first pass that finds a partition returns the optimum.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array
from autopar.search.partition.contract import Contracted, Unit
from autopar.search.partition.ideals import IdealTable

BLOCK_PAIRS = 1 << 20
STEPS = (1.003, 1.01, 1.03, 1.07, 1.15, 1.3, 1.5, 1.8, 2.2, 3.0, 5.0, 10.0)
"""Thresholds as multiples of the simple lower bound."""
ROUNDING = 1e-9
"""Relative slack of comparisons of sums that were added up in different orders."""
Cut = tuple[bool, int]
"""Is it a CPU, and the units as a bit set."""


@dataclass(frozen=True)
class Devices:
    """What the units are split over."""

    num_accelerators: int
    num_cpus: int
    memory_bytes: float


@dataclass(frozen=True)
class Outcome:
    """`cuts` in order, None if none was found; every partition along the table's ideals costs at least `bound_s`.

    `is_complete`: the program ended before its time limit.
    """

    cuts: tuple[Cut, ...] | None
    load_s: float
    bound_s: float
    is_complete: bool


class _OutOfTimeError(Exception):
    pass


def partition_ideals(
    table: IdealTable,
    graph: Contracted,
    devices: Devices,
    *,
    incumbent_s: float = math.inf,
    deadline_s: float = math.inf,
) -> Outcome:
    """The best partition below `incumbent_s` along the table's ideals.

    Args:
        deadline_s: stop at this value of time.monotonic().
    """
    bound_s = simple_bound_s(graph, devices)
    one_device_s = float(table.accelerator_s[table.full] + table.cpu_s[table.full]) + float(table.net_costs_s.sum())
    ceiling_s = min(incumbent_s, one_device_s * (1 + ROUNDING))
    thresholds = [bound_s * step for step in STEPS if bound_s * step < ceiling_s]
    for threshold_s in [*thresholds, ceiling_s]:
        try:
            values = _pass(table, graph, devices, (bound_s, threshold_s), deadline_s)
        except _OutOfTimeError:
            return Outcome(None, math.inf, bound_s, False)
        load_s = float(values[devices.num_cpus, devices.num_accelerators, table.full])
        if math.isfinite(load_s):
            return Outcome(_trace(table, devices, values), load_s, load_s, True)
        bound_s = max(bound_s, threshold_s)
    return Outcome(None, math.inf, incumbent_s if ceiling_s == incumbent_s else math.inf, True)


def simple_bound_s(graph: Contracted, devices: Devices) -> float:
    """No partition has a smaller largest load: total work, and the largest unit."""
    total_s = math.fsum(u.accelerator_s or 0.0 for u in graph.units)
    largest_s = max(_least_s(unit, devices) for unit in graph.units)
    if not math.isfinite(largest_s):
        return largest_s
    low_s, high_s = largest_s, max(largest_s, total_s + math.fsum(u.cpu_s for u in graph.units))
    for _ in range(60):
        middle_s = (low_s + high_s) / 2
        relief_s = devices.num_cpus * cpu_relief_s(graph, middle_s) if devices.num_cpus else 0.0
        is_enough = total_s - relief_s <= devices.num_accelerators * middle_s
        low_s, high_s = (low_s, middle_s) if is_enough else (middle_s, high_s)
    return low_s * (1 - ROUNDING)


def _least_s(unit: Unit, devices: Devices) -> float:
    can_accelerate = devices.num_accelerators and unit.size_bytes <= devices.memory_bytes
    accelerator_s = unit.accelerator_s if can_accelerate and unit.accelerator_s is not None else math.inf
    return min(accelerator_s, unit.cpu_s if devices.num_cpus else math.inf)


def cpu_relief_s(graph: Contracted, budget_s: float) -> float:
    """At most this much accelerator time fits on one CPU within its budget (fractional knapsack)."""
    relief_s = 0.0
    items = [(u.accelerator_s or 0.0, u.cpu_s) for u in graph.units]
    for accelerator_s, cpu_s in sorted(items, key=lambda i: -(i[0] / i[1] if i[1] > 0 else math.inf)):
        taken = 1.0 if cpu_s <= budget_s else budget_s / cpu_s
        relief_s += taken * accelerator_s
        budget_s -= taken * cpu_s
        if taken < 1.0:
            break
    return relief_s


def _pass(
    table: IdealTable, graph: Contracted, devices: Devices, range_s: tuple[float, float], deadline_s: float
) -> NDArray[np.float64]:
    """value[c, a, ideal] as far as it is at most the threshold, the upper end, and of use; infinite elsewhere.

    Values below the lower end, which no partition can reach, are raised to it: then fewer of them change.
    """
    threshold_s = range_s[1]
    cpus, accelerators = devices.num_cpus, devices.num_accelerators
    relief_s = cpu_relief_s(graph, threshold_s) if cpus else 0.0
    remaining_s = table.accelerator_s[table.full] - table.accelerator_s
    slack_s = ROUNDING * float(table.accelerator_s[table.full])
    values = np.full((cpus + 1, accelerators + 1, len(table)), np.inf)
    values[0, 0, table.empty] = range_s[0]
    for c in range(cpus + 1):
        for a in range(accelerators + 1):
            left = cpus - c
            need_s = remaining_s - left * relief_s if left else remaining_s + table.border_s
            useful = np.flatnonzero(need_s <= (accelerators - a) * threshold_s + slack_s)
            if left == 0 and a == accelerators:
                useful = np.array([table.full])
            if a:
                values[c, a, useful] = np.minimum(values[c, a, useful], values[c, a - 1, useful])
            for is_cpu, source, older in ((False, (c, a - 1), (c, a - 2)), (True, (c - 1, a), (c - 1, a - 1))):
                if min(source) >= 0:
                    step = _Step(table, devices, is_cpu, threshold_s, deadline_s)
                    known = values[older] if min(older) >= 0 else np.full(len(table), np.inf)
                    np.minimum(values[c, a], step.extend(values[source], known, useful), out=values[c, a])
    return values


@dataclass(frozen=True)
class _Step:
    """One more device."""

    table: IdealTable
    devices: Devices
    is_cpu: bool
    threshold_s: float
    deadline_s: float

    def extend(self, before: Array, known: Array, useful: NDArray[np.int64]) -> Array:
        """Values of the useful ideals when one device is added to partitions with values `before`.

        Where `before` is not below `known`, the values with one accelerator fewer, the step adds nothing new.
        """
        after = np.full(len(before), np.inf)
        rows = np.flatnonzero(before < known)
        scale_s = self.table.cpu_s if self.is_cpu else self.table.accelerator_s
        if self.is_cpu:
            rows, useful = (
                rows[np.argsort(scale_s[rows], kind="stable")],
                useful[np.argsort(scale_s[useful], kind="stable")],
            )
        slack_s = ROUNDING * float(scale_s[self.table.full])
        start = 0
        while start < len(rows):
            if time.monotonic() > self.deadline_s:
                raise _OutOfTimeError
            first = int(np.searchsorted(scale_s[useful], scale_s[rows[start]] - slack_s))
            stop = start + max(1, BLOCK_PAIRS // max(1, len(useful) - first))
            block = rows[start:stop]
            reach_s = scale_s[block[-1]] + self.threshold_s + slack_s
            columns = useful[first : int(np.searchsorted(scale_s[useful], reach_s, side="right"))]
            if len(columns):
                candidates = np.maximum(self.loads_s(block, columns), before[block][:, None])
                best = candidates.min(axis=0)
                after[columns] = np.minimum(after[columns], np.where(best <= self.threshold_s, best, np.inf))
            start += len(block)
        return after

    def loads_s(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """Load of the added device."""
        if self.is_cpu:
            return self.table.cpu_loads_s(rows, columns)
        return self.table.loads_s(rows, columns, self.devices.memory_bytes)


def _trace(table: IdealTable, devices: Devices, values: NDArray[np.float64]) -> tuple[Cut, ...]:
    """The cuts of the best partition, first device first."""
    cuts: list[Cut] = []
    c, a, ideal = devices.num_cpus, devices.num_accelerators, table.full
    while (c, a) != (0, 0):
        found = []
        for is_cpu, source in ((False, (c, a - 1)), (True, (c - 1, a))):
            if min(source) < 0:
                continue
            rows = np.flatnonzero(np.isfinite(values[source]))
            if len(rows):
                step = _Step(table, devices, is_cpu, math.inf, math.inf)
                loads = np.maximum(step.loads_s(rows, np.array([ideal]))[:, 0], values[source][rows])
                best = int(np.argmin(loads))
                found.append((float(loads[best]), is_cpu, int(rows[best]), source))
        _, is_cpu, previous, (c, a) = min(found)
        cuts.append((is_cpu, table.masks[ideal] & ~table.masks[previous]))
        ideal = previous
    return tuple(cut for cut in reversed(cuts) if cut[1])
