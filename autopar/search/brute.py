"""Brute force: enumerates the whole space on small tables. The oracle of the search; shares no arithmetic with it.

Loops over every mesh, K, M, cut, recompute pattern and combination of strategies, and prices each with plain Python
written from the definitions (`ir.pipeline` for the step time), not with `evaluate`, `problem` or `cuts`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.ir.cost import CostTable, Device, Link, TableSource
from autopar.ir.mixed import MixedSource
from autopar.ir.pipeline import microbatches_in_flight, step_time_s
from autopar.ir.solution import Decisions, Limits, Objective, Pins
from autopar.search.evaluate import Figures, Layout
from autopar.search.shared import Plan
from autopar.search.solve import spell_out
from autopar.search.space import Skeleton, list_skeletons


@dataclass(frozen=True)
class BruteResult:
    """Best plan of the space; None and inf if nothing fits. `least_peak_bytes` is over all plans, fitting or not."""

    value: float
    decisions: Decisions | None
    time_s: float
    energy_j: float
    least_peak_bytes: float


@dataclass(frozen=True)
class Enumerated:
    """One plan of the space and its figures, unpaced: seconds, joules, bytes of the fullest device, watts.

    `fits`: every stage into its memory. `fixed_w` is drawn all the time; `peak_w` is that plus the hungriest op or
    redistribution on all devices.
    """

    plan: Plan
    table: CostTable
    time_s: float
    energy_j: float
    peak_bytes: float
    fits: bool
    fixed_w: float
    peak_w: float

    def keeps(self, memory_bytes: float | None, limits: Limits) -> bool:
        """Whether the plan fits into memory (None: that of the devices) and below the peak power limit."""
        cool = limits.peak_power_w is None or self.peak_w <= limits.peak_power_w * (1 + 1e-9)
        fits = self.fits if memory_bytes is None else self.peak_bytes <= memory_bytes * (1 + 1e-9)
        return cool and fits

    def paced(self, limits: Limits) -> tuple[float, float] | None:
        """(T, E) with the waiting that an average power cap needs; None if a limit is broken all the same."""
        time_s, energy_j = self.time_s, self.energy_j
        cap = limits.average_power_w
        if cap is not None and energy_j / time_s > cap:
            if cap <= self.fixed_w:
                return None
            wait_s = (energy_j - cap * time_s) / (cap - self.fixed_w)
            time_s, energy_j = time_s + wait_s, energy_j + self.fixed_w * wait_s
        if limits.deadline_s is not None and time_s > limits.deadline_s * (1 + 1e-9):
            return None
        if limits.energy_j is not None and energy_j > limits.energy_j * (1 + 1e-9):
            return None
        return time_s, energy_j


def enumerate_plans(
    tables: TableSource, *, pins: Pins, use_all: bool = False, max_microbatches: int | None = None
) -> Iterator[Enumerated]:
    """Every admissible plan, whether it fits or not."""
    schedule = pins.schedule or "1f1b"
    cases = {
        (s.sizes, s.num_stages, s.num_microbatches, clock)
        for s in list_skeletons(tables, pins, use_all=use_all, max_microbatches=max_microbatches)
        for clock in range(len(tables.clocks_hz))
    }
    for sizes, num_stages, num_microbatches, clock in sorted(cases):
        skeleton = Skeleton(num_stages, sizes, num_microbatches, "none", (clock, clock))
        for types in _types(tables, num_stages, skeleton.mesh.num_devices):
            stages = _stages(tables, types, skeleton, clock)
            for layout in layouts(len(tables.graph.blocks), num_stages, pins.recompute, schedule) if stages else ():
                table, placed = stages[0].table, replace(layout, kinds=types)
                for choice in choices(table):
                    time_s, energy_j, overfull, watts = _price(stages, placed, choice)
                    if math.isfinite(time_s):
                        figures = Figures(time_s, energy_j, (), (), (), ())
                        plan = Plan(replace(skeleton, kinds=types), placed, choice, figures)
                        hungriest = skeleton.num_gpus * max(_draws_w(table, choice), default=0.0)
                        peak = max(used for used, _ in overfull)
                        fits = all(used <= limit * (1 + 1e-9) for used, limit in overfull)
                        yield Enumerated(plan, table, time_s, energy_j, peak, fits, watts, watts + hungriest)


@dataclass(frozen=True)
class _Stage:
    """What a stage is priced with; `link` is that from the stage before."""

    table: CostTable
    device: Device
    link: Link
    kind: int = 0


def _types(tables: TableSource, num_stages: int, num_devices: int) -> Iterator[tuple[int, ...]]:
    """Every sequence of types in which no type comes back after another and none is used up."""
    if not isinstance(tables, MixedSource):
        yield ()
        return
    for types in itertools.product(range(len(tables.parts)), repeat=num_stages):
        runs = [kind for kind, _ in itertools.groupby(types)]
        used = {kind: types.count(kind) * num_devices for kind in runs}
        if len(runs) == len(used) and all(n <= tables.parts[kind].device.num_gpus for kind, n in used.items()):
            yield types


def _stages(tables: TableSource, types: tuple[int, ...], skeleton: Skeleton, clock: int) -> list[_Stage]:
    """One entry per stage; none where the batch does not divide."""
    mesh, count = skeleton.mesh, skeleton.num_microbatches
    if not isinstance(tables, MixedSource):
        table, figures = tables.table(mesh, count), tables.clock_figures(mesh, count)
        if table is None or figures is None:
            return []
        table = figures.at(table, clock)
        return [_Stage(table, tables.device, table.link)] * skeleton.num_stages
    found = []
    for before, kind in zip((types[0], *types), types, strict=False):
        own = tables.parts[kind].table(mesh, count)
        if own is None:
            return []
        link = own.link if before == kind else tables.links[before, kind]
        found.append(_Stage(own, tables.parts[kind].device, link, kind))
    return found


def brute_force(
    tables: TableSource,
    objective: Objective,
    *,
    pins: Pins,
    limits: Limits | None = None,
    use_all: bool = False,
    max_microbatches: int | None = None,
) -> BruteResult:
    """Enumerate; see the module docstring."""
    schedule, limits = pins.schedule or "1f1b", Limits() if limits is None else limits
    names = tables.names if isinstance(tables, MixedSource) else ()
    best, least_peak = BruteResult(math.inf, None, math.inf, math.inf, math.inf), math.inf
    for found in enumerate_plans(tables, pins=pins, use_all=use_all, max_microbatches=max_microbatches):
        least_peak = min(least_peak, found.peak_bytes)
        paced = found.paced(limits) if found.keeps(None, limits) else None
        if paced is None:
            continue
        value = objective.value(*paced, found.plan.skeleton.num_gpus)
        if value < best.value:
            best = BruteResult(value, spell_out(found.table, found.plan, schedule, 0.0, names), *paced, math.inf)
    return BruteResult(best.value, best.decisions, best.time_s, best.energy_j, least_peak)


def _draws_w(table: CostTable, choice: Sequence[int]) -> Iterator[float]:
    """Dynamic power of every op and redistribution, one device."""
    for node, p in zip(table.nodes, choice, strict=True):
        if node.forward_s[p] + node.backward_s[p] > 0:
            yield float(node.microbatch_j[p] / (node.forward_s[p] + node.backward_s[p]))
    for edge in table.edges:
        p, q = choice[edge.source], choice[edge.target]
        if edge.forward_s[p, q] + edge.backward_s[p, q] > 0:
            yield float(edge.microbatch_j[p, q] / (edge.forward_s[p, q] + edge.backward_s[p, q]))


def layouts(num_blocks: int, num_stages: int, recompute: str | None, schedule: str) -> Iterator[Layout]:
    """Every cut into `num_stages` stages with every recompute pattern allowed."""
    allowed = {None: (False, True), "none": (False,), "full": (True,)}[recompute]
    for cuts in itertools.combinations(range(1, num_blocks), num_stages - 1):
        for pattern in itertools.product(allowed, repeat=num_stages):
            yield Layout(num_blocks, (0, *cuts), pattern, schedule)


def choices(table: CostTable) -> Iterator[tuple[int, ...]]:
    """Every combination of strategies."""
    return itertools.product(*(range(len(node.choices)) for node in table.nodes))


def _price(
    stages: Sequence[_Stage], layout: Layout, choice: Sequence[int]
) -> tuple[float, float, list[tuple[float, float]], float]:
    """(T, E, memory used and usable of every stage, fixed power)."""
    bounds = [*layout.starts, layout.num_blocks]
    times, steps, joules, peaks = [], [], 0.0, []
    for k, stage in enumerate(stages):
        table, link = stage.table, stage.link
        blocks = set(range(bounds[k], bounds[k + 1]))
        seconds, step_s, microbatch_j, step_j = _stage_costs(table, choice, blocks, redo=layout.recompute[k])
        if k > 0:
            for crossing in table.crossings:
                if crossing.producer_block < bounds[k] <= crossing.last_block:
                    size = crossing.bytes_by_choice[choice[crossing.node]]
                    seconds += 2 * (link.latency_s + size * link.s_per_byte)
                    microbatch_j += 2 * size * link.j_per_byte
        times.append(float(seconds))
        steps.append(float(step_s))
        joules += float(table.mesh.num_devices * (table.num_microbatches * microbatch_j + step_j))
        in_flight = microbatches_in_flight(k, len(layout.starts), table.num_microbatches, layout.schedule)
        used_bytes = _stage_memory(table, choice, blocks, in_flight, redo=layout.recompute[k])
        peaks.append((used_bytes, float(stage.device.memory_bytes)))
    time_s = step_time_s(times, steps, stages[0].table.num_microbatches)
    watts = 0.0
    for kind in {stage.kind for stage in stages}:
        own = [stage for stage in stages if stage.kind == kind]
        used = own[0].table.mesh.num_devices * len(own)
        watts += own[0].device.blocked_w * used
        watts += own[0].device.host_w_per_node * (-(-used // own[0].device.gpus_per_node))
    return time_s, joules + watts * time_s, peaks, watts


def _occurrences(table: CostTable, index: int, blocks: set[int]) -> Iterator[int]:
    """Blocks (or -1) in which node `index` is paid by a stage of `blocks`; once per foreign parameter read."""
    node = table.nodes[index]
    for block in node.blocks:
        if block == -1 or block in blocks:
            yield block
        elif node.kind == "param" and any(
            edge.source == index and (home, reader) == (block, other)
            for edge in table.edges
            for home, reader in edge.cut_pairs
            for other in blocks
        ):
            yield -2


def _stage_costs(
    table: CostTable, choice: Sequence[int], blocks: set[int], *, redo: bool
) -> tuple[float, float, float, float]:
    seconds = step_s = microbatch_j = step_j = 0.0
    for index, node in enumerate(table.nodes):
        p = choice[index]
        for block in _occurrences(table, index, blocks):
            again = node.forward_s[p] if redo and block != -1 else 0.0
            total = node.forward_s[p] + node.backward_s[p]
            seconds += total + again
            microbatch_j += node.microbatch_j[p] * (1 + (again / total if total else 0.0))
            step_s += node.step_s[p]
            step_j += node.step_j[p]
    for edge in table.edges:
        p, q = choice[edge.source], choice[edge.target]
        for block in edge.blocks:
            if block == -1 or block in blocks:
                if not math.isfinite(edge.forward_s[p, q] + edge.backward_s[p, q]):
                    return math.inf, 0.0, 0.0, 0.0
                again = edge.forward_s[p, q] if redo and block != -1 else 0.0
                total = edge.forward_s[p, q] + edge.backward_s[p, q]
                seconds += total + again
                microbatch_j += edge.microbatch_j[p, q] * (1 + (again / total if total else 0.0))
    return seconds, step_s, microbatch_j, step_j


def _stage_memory(table: CostTable, choice: Sequence[int], blocks: set[int], in_flight: int, *, redo: bool) -> float:
    state = kept = workspace = 0.0
    per_block = dict.fromkeys(blocks, 0.0)
    for index, node in enumerate(table.nodes):
        p = choice[index]
        for block in _occurrences(table, index, blocks):
            state += node.state_bytes[p]
            kept += node.boundary_bytes[p] if redo else node.activation_bytes[p]
            workspace = max(workspace, node.workspace_bytes[p])
            if block in per_block:
                per_block[block] += node.activation_bytes[p]
    return state + in_flight * kept + (max(per_block.values()) if redo else 0.0) + workspace
