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
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from autopar.ir.cost import Array, CostTable, Device, Link
from autopar.ir.pipeline import microbatches_in_flight, step_time_s
from autopar.ir.solution import StageChoice

SHARED = -1
MEMORY_TOLERANCE = 1e-9
"""Relative excess that still counts as fitting: sums of bytes are floats."""


@dataclass(frozen=True)
class Layout:
    """Stages of a pipeline: `starts[k]` is the first block of stage k (starts[0] == 0).

    `kinds` are the types of their devices on a mixed cluster (`ir.mixed`); () where there is one type.
    """

    num_blocks: int
    starts: tuple[int, ...]
    recompute: tuple[bool, ...]
    schedule: str = "1f1b"
    kinds: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    def stop(self, stage: int) -> int:
        return self.starts[stage + 1] if stage + 1 < len(self.starts) else self.num_blocks

    def stage_of(self) -> list[int]:
        """Stage of every block."""
        return [k for k in range(self.num_stages) for _ in range(self.starts[k], self.stop(k))]

    def choices(self, clock_hz: float = 0.0, names: Sequence[str] = ()) -> tuple[StageChoice, ...]:
        """As a plan has them; `names` are those of the types."""
        gpus = [names[kind] for kind in self.kinds] or [""] * self.num_stages
        return tuple(
            StageChoice(start, self.stop(k), "full" if self.recompute[k] else "none", clock_hz, gpus[k])
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

    def fits(self, memory_bytes: Sequence[float]) -> bool:
        """Whether every stage keeps its limit."""
        pairs = zip(self.memory_bytes, memory_bytes, strict=True)
        return all(used <= limit * (1 + MEMORY_TOLERANCE) for used, limit in pairs)


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


def _counts(blocks: Sequence[tuple[int, ...]], layout: Layout) -> tuple[Array, Array]:
    """How often each stage pays each entry for its own blocks, and for shared entries: two [entries, stages]."""
    rows = np.repeat(np.arange(len(blocks)), [len(b) for b in blocks])
    flat = np.fromiter((b for entry in blocks for b in entry), dtype=np.int64, count=len(rows))
    is_own = flat != SHARED
    own, shared = np.zeros((len(blocks), layout.num_stages)), np.zeros((len(blocks), layout.num_stages))
    stages = np.array(layout.stage_of(), dtype=np.int64)
    np.add.at(own, (rows[is_own], stages[flat[is_own]]), 1.0)
    np.add.at(shared, rows[~is_own], 1.0)
    return own, shared


def _add_foreign(table: CostTable, layout: Layout, own: Array) -> None:
    stage_of = layout.stage_of()
    for index, home, readers in foreign_reads(table):
        for k in sorted({stage_of[b] for b in readers} - {stage_of[home]}):
            own[index, k] += 1.0


def _pay(own: Array, shared: Array, redo: Array, costs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Seconds and joules of one microbatch per stage; `costs` are forward_s, backward_s, microbatch_j per entry."""
    forward_s, backward_s, energy_j = costs
    again = own * redo
    seconds = (forward_s + backward_s) @ (own + shared) + forward_s @ again
    joules = energy_j @ (own + shared) + (energy_j * redo_share(forward_s, backward_s)) @ again
    return seconds, joules


@dataclass(frozen=True)
class _Stages:
    """Sums per stage; seconds and joules of one microbatch or step, joules and bytes of one device."""

    time_s: Array
    step_s: Array
    energy_j: Array
    step_j: Array
    state: Array
    kept: Array
    largest_block: Array
    workspace: Array


def _collect(table: CostTable, layout: Layout, choice: Sequence[int], link: Link) -> _Stages:
    def chosen(name: str) -> Array:
        return np.array([getattr(node, name)[p] for node, p in zip(table.nodes, choice, strict=True)])

    def on_edges(name: str) -> Array:
        return np.array([getattr(e, name)[choice[e.source], choice[e.target]] for e in table.edges], dtype=np.float64)

    redo = np.array(layout.recompute, dtype=np.float64)
    own, shared = _counts([node.blocks for node in table.nodes], layout)
    activations = chosen("activation_bytes")
    largest = _largest_blocks(table, layout, activations)
    _add_foreign(table, layout, own)
    seconds, joules = _pay(own, shared, redo, (chosen("forward_s"), chosen("backward_s"), chosen("microbatch_j")))
    edge_own, edge_shared = _counts([edge.blocks for edge in table.edges], layout)
    edge_costs = (on_edges("forward_s"), on_edges("backward_s"), on_edges("microbatch_j"))
    edge_seconds, edge_joules = _pay(edge_own, edge_shared, redo, edge_costs)
    send_s, send_j = _sends(table, layout, choice, link)
    paid = own + shared
    return _Stages(
        time_s=seconds + edge_seconds + send_s,
        step_s=chosen("step_s") @ paid,
        energy_j=joules + edge_joules + send_j,
        step_j=chosen("step_j") @ paid,
        state=chosen("state_bytes") @ paid,
        kept=np.where(redo > 0, chosen("boundary_bytes") @ paid, activations @ paid),
        largest_block=np.where(redo > 0, largest, 0.0),
        workspace=np.max(np.where(paid > 0, chosen("workspace_bytes")[:, None], 0.0), axis=0),
    )


def _largest_blocks(table: CostTable, layout: Layout, activations: Array) -> Array:
    """Activation bytes of the largest block of every stage, one microbatch."""
    per_block = np.zeros(table.num_blocks)
    for node, size in zip(table.nodes, activations, strict=True):
        np.add.at(per_block, [b for b in node.blocks if b != SHARED], size)
    return np.array([np.max(per_block[start : layout.stop(k)]) for k, start in enumerate(layout.starts)])


def _sends(table: CostTable, layout: Layout, choice: Sequence[int], link: Link) -> tuple[Array, Array]:
    seconds, joules = np.zeros(layout.num_stages), np.zeros(layout.num_stages)
    for crossing in table.crossings:
        size = float(crossing.bytes_by_choice[choice[crossing.node]])
        for k, start in enumerate(layout.starts):
            if crossing.producer_block < start <= crossing.last_block:
                seconds[k] += 2 * (link.latency_s + size * link.s_per_byte)
                joules[k] += 2 * size * link.j_per_byte
    return seconds, joules


def fixed_power_w(device: Device, num_gpus: int) -> float:
    """Blocked power of the devices used and their hosts, watts."""
    return device.blocked_w * num_gpus + device.host_w_per_node * math.ceil(num_gpus / device.gpus_per_node)


def evaluate(table: CostTable, device: Device, layout: Layout, choice: Sequence[int]) -> Figures:
    """Figures of the module docstring for `choice[i]` = index of node i's strategy.

    Raises:
        ValueError: if the choice pairs strategies that an edge forbids.
    """
    _check_pairs(table, choice)
    stages = _collect(table, layout, choice, table.link)
    return _figures(table, stages, layout, fixed_power_w(device, table.mesh.num_devices * layout.num_stages))


def evaluate_mixed(
    tables: Sequence[tuple[CostTable, Link]], fixed_w: float, layout: Layout, choice: Sequence[int]
) -> Figures:
    """The same where every stage has its own table and link from the stage before; `fixed_w` is that of all.

    Raises:
        ValueError: if the choice pairs strategies that an edge forbids.
    """
    table = tables[0][0]
    _check_pairs(table, choice)
    made = {(id(own), link): _collect(own, layout, choice, link) for own, link in tables}
    each = [made[id(own), link] for own, link in tables]
    sums = {f.name: np.array([getattr(stages, f.name)[k] for k, stages in enumerate(each)]) for f in fields(_Stages)}
    return _figures(table, _Stages(**sums), layout, fixed_w)


def _check_pairs(table: CostTable, choice: Sequence[int]) -> None:
    for edge in table.edges:
        if not math.isfinite(edge.forward_s[choice[edge.source], choice[edge.target]]):
            names = table.nodes[edge.source].name, table.nodes[edge.target].name
            raise ValueError(f"forbidden pair of strategies between {names[0]} and {names[1]}")


def _figures(table: CostTable, stages: _Stages, layout: Layout, fixed_w: float) -> Figures:
    num_microbatches, num_devices, num_stages = table.num_microbatches, table.mesh.num_devices, layout.num_stages
    times, steps = tuple(map(float, stages.time_s)), tuple(map(float, stages.step_s))
    time_s = step_time_s(times, steps, num_microbatches)
    dynamic_j = num_devices * float(np.sum(num_microbatches * stages.energy_j + stages.step_j))
    memory = tuple(
        {
            "state": float(stages.state[k]),
            "activations": float(
                stages.kept[k] * microbatches_in_flight(k, num_stages, num_microbatches, layout.schedule)
                + stages.largest_block[k]
            ),
            "workspace": float(stages.workspace[k]),
        }
        for k in range(num_stages)
    )
    totals = tuple(sum(m.values()) for m in memory)
    return Figures(time_s, dynamic_j + fixed_w * time_s, times, steps, totals, memory)


def redo_share(forward_s: Array, backward_s: Array) -> Array:
    """Forward / (forward + backward), 0 where both are 0; forbidden entries (inf) give 0."""
    total = forward_s + backward_s
    usable = np.isfinite(total) & (total > 0)
    return np.divide(forward_s, total, out=np.zeros_like(total), where=usable)
