"""Exact figures of one choice on a CostTable: the definition of what the search minimises.

With stages k = 0..K-1, M microbatches, n devices per stage, `in_flight` from `ir.pipeline`:

    t_k  = sum over blocks b of stage k of (nodes and edges paid by b: forward + backward [+ forward if full recompute])
           + shared nodes and edges + 2 * (latency + bytes / bandwidth) of each crossing cut at the stage's start
    g_k  = sum of step_s
    T    = step_time_s(t, g, M)
    E    = M n sum_k e_k + n sum_k j_k + (blocked_w * n K + host_w * ceil(n K / gpus_per_node)) * T
    m_k  = state + in_flight_k * (activations, or boundary bytes under full recompute)
           + largest activations of one block (full recompute only) + largest workspace

e_k is dynamic energy of one microbatch on one device; full recompute adds to each entry its forward share,
forward_s / (forward_s + backward_s). A parameter that is read in several stages exists, and is paid, in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.ir.cost import Array, CostEdge, CostNode, CostTable, Device
from autopar.ir.pipeline import microbatches_in_flight, step_time_s
from autopar.ir.solution import StageChoice

SHARED = -1
MEMORY_TOLERANCE = 1e-9
"""Relative excess that still counts as fitting: sums of bytes are floats."""


@dataclass(frozen=True)
class Layout:
    """Stages of a pipeline: `starts[k]` is the first block of stage k (starts[0] == 0)."""

    num_blocks: int
    starts: tuple[int, ...]
    recompute: tuple[bool, ...]
    schedule: str = "1f1b"

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    def stop(self, stage: int) -> int:
        return self.starts[stage + 1] if stage + 1 < len(self.starts) else self.num_blocks

    def stage_of(self) -> list[int]:
        """Stage of every block."""
        return [k for k in range(self.num_stages) for _ in range(self.starts[k], self.stop(k))]

    def choices(self) -> tuple[StageChoice, ...]:
        return tuple(
            StageChoice(start, self.stop(k), "full" if self.recompute[k] else "none")
            for k, start in enumerate(self.starts)
        )


@dataclass(frozen=True)
class Figures:
    """Figures of one choice; tuples have one entry per stage. `memory_by_cause` keys: state, activations, workspace."""

    time_s: float
    energy_j: float
    stage_s: tuple[float, ...]
    stage_step_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    memory_by_cause: tuple[dict[str, float], ...]

    @property
    def peak_memory_bytes(self) -> float:
        return max(self.memory_bytes)

    def fits(self, memory_bytes: float) -> bool:
        return self.peak_memory_bytes <= memory_bytes * (1 + MEMORY_TOLERANCE)


@dataclass
class _Stage:
    """Running sums of one stage; seconds and joules of one microbatch, joules of one device."""

    redo: bool
    time_s: float = 0.0
    step_s: float = 0.0
    energy_j: float = 0.0
    step_j: float = 0.0
    state: float = 0.0
    activations: float = 0.0
    boundary: float = 0.0
    workspace: float = 0.0

    def pay(self, forward_s: float, backward_s: float, energy_j: float, redo: bool) -> None:
        total = forward_s + backward_s
        self.time_s += total + (forward_s if redo else 0.0)
        share = forward_s / total if redo and total > 0 else 0.0
        self.energy_j += energy_j * (1 + share)

    def add_node(self, node: CostNode, p: int, *, shared: bool) -> None:
        self.pay(
            float(node.forward_s[p]), float(node.backward_s[p]), float(node.microbatch_j[p]), self.redo and not shared
        )
        self.step_s += float(node.step_s[p])
        self.step_j += float(node.step_j[p])
        self.state += float(node.state_bytes[p])
        self.activations += float(node.activation_bytes[p])
        self.boundary += float(node.boundary_bytes[p])
        self.workspace = max(self.workspace, float(node.workspace_bytes[p]))

    def add_edge(self, edge: CostEdge, p: int, q: int, *, shared: bool) -> None:
        self.pay(
            float(edge.forward_s[p, q]), float(edge.backward_s[p, q]), float(edge.microbatch_j[p, q]),
            self.redo and not shared,
        )  # fmt: skip


def foreign_reads(table: CostTable) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """(param node, home block, other blocks that read the same parameter), where there are any."""
    readers: dict[tuple[int, int], set[int]] = {}
    for edge in table.edges:
        if table.nodes[edge.source].kind != "param":
            continue
        for home, reader in edge.cut_pairs:
            if home not in (reader, SHARED) and reader != SHARED:
                readers.setdefault((edge.source, home), set()).add(reader)
    return tuple((node, home, tuple(sorted(found))) for (node, home), found in sorted(readers.items()))


def node_occurrences(table: CostTable, layout: Layout) -> Iterator[tuple[int, int, bool]]:
    """(node index, stage that pays, shared) for every payment of a node."""
    stage_of = layout.stage_of()
    for index, node in enumerate(table.nodes):
        for block in node.blocks:
            if block == SHARED:
                yield from ((index, k, True) for k in range(layout.num_stages))
            else:
                yield index, stage_of[block], False
    for index, home, readers in foreign_reads(table):
        for k in sorted({stage_of[b] for b in readers} - {stage_of[home]}):
            yield index, k, False


def block_activations(table: CostTable, choice: Sequence[int]) -> list[float]:
    """Activation bytes of every block, one microbatch."""
    total = [0.0] * table.num_blocks
    for node, p in zip(table.nodes, choice, strict=True):
        for block in node.blocks:
            if block != SHARED:
                total[block] += float(node.activation_bytes[p])
    return total


def _collect(table: CostTable, layout: Layout, choice: Sequence[int]) -> list[_Stage]:
    stages = [_Stage(redo) for redo in layout.recompute]
    stage_of = layout.stage_of()
    for index, k, shared in node_occurrences(table, layout):
        stages[k].add_node(table.nodes[index], choice[index], shared=shared)
    for edge in table.edges:
        p, q = choice[edge.source], choice[edge.target]
        for block in edge.blocks:
            for k in range(layout.num_stages) if block == SHARED else (stage_of[block],):
                stages[k].add_edge(edge, p, q, shared=block == SHARED)
    for crossing in table.crossings:
        size = float(crossing.bytes_by_choice[choice[crossing.node]])
        for k, start in enumerate(layout.starts):
            if crossing.producer_block < start <= crossing.last_block:
                stages[k].time_s += 2 * (table.p2p_latency_s + size * table.p2p_s_per_byte)
                stages[k].energy_j += 2 * size * table.p2p_j_per_byte
    return stages


def fixed_power_w(device: Device, num_gpus: int) -> float:
    """Blocked power of the devices used and their hosts, watts."""
    return device.blocked_w * num_gpus + device.host_w_per_node * math.ceil(num_gpus / device.gpus_per_node)


def _memory(stage: _Stage, in_flight: int, largest_block: float) -> dict[str, float]:
    kept = in_flight * (stage.boundary if stage.redo else stage.activations)
    return {
        "state": stage.state,
        "activations": kept + (largest_block if stage.redo else 0.0),
        "workspace": stage.workspace,
    }


def evaluate(table: CostTable, device: Device, layout: Layout, choice: Sequence[int]) -> Figures:
    """Figures of the module docstring for `choice[i]` = index of node i's strategy; inf time for a forbidden pair."""
    stages = _collect(table, layout, choice)
    times, steps = tuple(s.time_s for s in stages), tuple(s.step_s for s in stages)
    num_microbatches, num_devices = table.num_microbatches, table.mesh.num_devices
    time_s = step_time_s(times, steps, num_microbatches)
    dynamic_j = num_devices * sum(num_microbatches * s.energy_j + s.step_j for s in stages)
    fixed_w = fixed_power_w(device, num_devices * layout.num_stages)
    per_block = block_activations(table, choice)
    memory = tuple(
        _memory(
            stage,
            microbatches_in_flight(k, layout.num_stages, num_microbatches, layout.schedule),
            max(per_block[layout.starts[k] : layout.stop(k)]),
        )
        for k, stage in enumerate(stages)
    )
    totals = tuple(sum(m.values()) for m in memory)
    return Figures(time_s, dynamic_j + fixed_w * time_s, times, steps, totals, memory)


def redo_share(forward_s: Array, backward_s: Array) -> Array:
    """Forward / (forward + backward), 0 where both are 0; forbidden entries (inf) give 0."""
    total = forward_s + backward_s
    usable = np.isfinite(total) & (total > 0)
    return np.divide(forward_s, total, out=np.zeros_like(total), where=usable)
