"""Problem: a CostTable as flat channel arrays, from which weighted pairwise networks are made quickly.

A linear objective over the pipeline gives every block b a weight per channel (`Weights.blocks[b, channel]`; the last
row is for shared entries). The cost of node i is then

    c_i[p] = sum_channel (sum_{b in blocks(i)} w[b, channel]) * value_i[channel, p]  + extra_i[p]

and likewise r_ij[p, q] for edges, whose blocks are those that pay. Parallel edges are summed, edges from a node to
itself fold into c_i as their diagonal. Forbidden pairs are inf. Strategies with no finite partner on some edge are
dropped when the problem is made (arc consistency), so indices here are positions in `kept[i]`.

Channels: TIME = forward + backward + step / M, REDO = forward (added by full recompute), ENERGY and REDO_ENERGY in
joules per step of all devices of the stage, then STATE, ACTIVATION, BOUNDARY, LEAST_KEPT = min(ACTIVATION, BOUNDARY)
and WORKSPACE in bytes. On a mixed cluster (`ir.mixed`) the first four are those of type 0, and those of type 1, 2, ...
follow after WORKSPACE, four by four (`pay_channels`); edges have the four of each type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from autopar.ir.cost import Array, CostEdge, CostTable, Link
from autopar.search.evaluate import SHARED, foreign_reads, redo_share
from autopar.search.ilp import solve_ilp
from autopar.search.reduce import Elimination, Network, Plan, back_substitute, core_network, make_plan, run_plan

TIME, REDO, ENERGY, REDO_ENERGY, STATE, ACTIVATION, BOUNDARY, LEAST_KEPT, WORKSPACE = range(9)
NUM_CHANNELS = 9
NUM_WEIGHTS = 8
NUM_EDGE_CHANNELS = 4
TABLE_CAP = 12_000_000
"""Largest table that elimination may make, entries (96 MB, held only while it is minimised)."""

Index = NDArray[np.int64]


def pay_channels(kind: int) -> tuple[int, int, int, int]:
    """TIME, REDO, ENERGY and REDO_ENERGY of a type."""
    first = NUM_CHANNELS + NUM_EDGE_CHANNELS * (kind - 1) if kind else 0
    return first, first + 1, first + 2, first + 3


@dataclass(frozen=True)
class Weights:
    """Weights of one linear objective.

    Attributes:
        blocks: [num_blocks + 1, `Problem.num_weights`]; the last row weighs shared entries.
        nodes: additional [num_weights] per node index (a parameter that also exists elsewhere).
        extra: additional cost per strategy of a node (crossings, workspace).
        constant: added to every value.
    """

    blocks: Array
    nodes: Mapping[int, Array] = field(default_factory=dict)
    extra: Mapping[int, Array] = field(default_factory=dict)
    constant: float = 0.0


@dataclass(frozen=True)
class Optimum:
    """`value` <= the minimum (equal, unless HiGHS stopped early on a core); `choice` None if there is none."""

    value: float
    choice: tuple[int, ...] | None


@dataclass(frozen=True)
class Problem:
    """See the module docstring. S = all kept strategies, P = all kept pairs of all edges.

    On a mixed cluster `table` is that of type 0, `parts` are the problems of all types, and `links` join them.
    """

    table: CostTable
    kept: tuple[Index, ...]
    offsets: Index
    node_of: Index
    values: Array
    node_count: Array
    ends: tuple[tuple[int, int], ...]
    edge_offsets: Index
    edge_of: Index
    edge_values: Array
    forbidden: NDArray[np.bool_]
    edge_count: Array
    pair_edges: Mapping[tuple[int, int], tuple[int, ...]]
    plan: Plan
    foreign: tuple[tuple[int, int, tuple[int, ...]], ...]
    cache: dict[bytes, Optimum]
    parts: tuple[Problem, ...] = ()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return self.table.num_blocks

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(k) for k in self.kept)

    @property
    def num_weights(self) -> int:
        """Columns of `Weights.blocks`."""
        return len(self.values) if self.parts else NUM_WEIGHTS

    @property
    def edge_channels(self) -> slice | Index:
        """Columns of `Weights.blocks` that weigh edges."""
        if not self.parts:
            return slice(0, NUM_EDGE_CHANNELS)
        return np.array([channel for kind in range(len(self.parts)) for channel in pay_channels(kind)], dtype=np.int64)

    def part(self, kinds: Sequence[int], stage: int) -> Problem:
        """The problem of one stage's type; `kinds` () where there is one type."""
        return self.parts[kinds[stage]] if kinds else self

    def link(self, kinds: Sequence[int], stage: int) -> Link:
        """From the stage before (of stage 0: never used)."""
        if kinds and stage and kinds[stage - 1] != kinds[stage]:
            return self.links[kinds[stage - 1], kinds[stage]]
        return self.part(kinds, stage).table.link

    @property
    def num_entries(self) -> int:
        """Strategies and pairs."""
        return int(self.values.shape[1] + self.edge_values.shape[1])

    def original(self, choice: Sequence[int]) -> tuple[int, ...]:
        """Positions in `kept` back to strategy indices of the table."""
        return tuple(int(kept[p]) for kept, p in zip(self.kept, choice, strict=True))

    def node_values(self, node: int, channel: int) -> Array:
        return self.values[channel, self.offsets[node] : self.offsets[node + 1]]

    def network(self, weights: Weights) -> Network:
        """The pairwise network of one linear objective."""
        node_weight = self.node_count @ weights.blocks
        for node, vector in weights.nodes.items():
            node_weight[node] += vector
        flat = np.zeros(self.values.shape[1])
        for channel in np.flatnonzero(np.any(node_weight != 0, axis=0)):
            flat += node_weight[self.node_of, channel] * self.values[channel]
        unary = [flat[self.offsets[i] : self.offsets[i + 1]] for i in range(len(self.kept))]
        for node, cost in weights.extra.items():
            unary[node] += cost
        edge_weight = self.edge_count @ weights.blocks[:, self.edge_channels]
        edge_flat = np.zeros(self.edge_values.shape[1])
        for channel in np.flatnonzero(np.any(edge_weight != 0, axis=0)):
            edge_flat += edge_weight[self.edge_of, channel] * self.edge_values[channel]
        edge_flat[self.forbidden] = np.inf
        pairs: dict[tuple[int, int], Array] = {}
        for (i, j), edges in self.pair_edges.items():
            table = sum_tables([self._edge_table(edge_flat, e) for e in edges])
            if i == j:
                unary[i] += np.diagonal(table)
            else:
                pairs[i, j] = table
        return Network(tuple(unary), pairs)

    def _edge_table(self, flat: Array, edge: int) -> Array:
        i, j = self.ends[edge]
        table = flat[self.edge_offsets[edge] : self.edge_offsets[edge + 1]].reshape(
            len(self.kept[i]), len(self.kept[j])
        )
        return table.T if i > j else table

    def solve(self, weights: Weights) -> Optimum:
        """Optimum of one linear objective, without the weights' constant; remembered."""
        key = _key(weights)
        if key not in self.cache:
            run = self.run(weights)
            choice, value = run.choice, run.value
            if run.plan.core:
                value, choice = solve_core(run)
            self.cache[key] = Optimum(value, choice)
        return self.cache[key]

    def least(self, weights: Weights) -> float:
        """A lower bound on one linear objective, without its constant: the optimum, unless a core remains."""
        run = run_plan(self.plan, self.network(weights), choose=False)
        return solve_core(run)[0] if run.plan.core else run.value

    def run(self, weights: Weights) -> Elimination:
        """The elimination itself, with its tables; a core may remain."""
        return run_plan(self.plan, self.network(weights))

    def block_totals(self, choice: Sequence[int]) -> Array:
        """[channel, num_blocks + 1]: sums per block of every channel (workspace: maximum); last column shared."""
        chosen = self.values[:, self.offsets[:-1] + np.asarray(choice, dtype=np.int64)]
        totals = chosen @ self.node_count
        present = self.node_count > 0
        totals[WORKSPACE] = np.max(np.where(present, chosen[WORKSPACE][:, None], 0.0), axis=0, initial=0.0)
        if self.ends:
            width = np.array([len(self.kept[j]) for _, j in self.ends])
            at = np.array([choice[i] for i, _ in self.ends]) * width + np.array([choice[j] for _, j in self.ends])
            totals[self.edge_channels] += self.edge_values[:, self.edge_offsets[:-1] + at] @ self.edge_count
        return totals

    def sends(self, start: int) -> tuple[tuple[int, Array], ...]:
        """(node, local bytes per strategy) of every value sent when a stage starts at block `start`."""
        return tuple(
            (c.node, c.bytes_by_choice[self.kept[c.node]])
            for c in self.table.crossings
            if c.producer_block < start <= c.last_block
        )


def sum_tables(tables: list[Array]) -> Array:
    """Sum of equally shaped tables; the one table itself if there is only one."""
    total = tables[0]
    for table in tables[1:]:
        total = total + table
    return total


def make_problem(table: CostTable) -> Problem | None:
    """Flatten a table; None where arc consistency leaves a node without strategies."""
    kept = _arc_consistent(table)
    if any(len(k) == 0 for k in kept):
        return None
    sizes = np.array([len(k) for k in kept], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    values = _node_values(table, kept)
    edge_arrays = [_edge_values(table, edge, kept) for edge in table.edges]
    lengths = [a.shape[1] for a in edge_arrays]
    edge_values = np.concatenate(edge_arrays, axis=1) if edge_arrays else np.zeros((NUM_EDGE_CHANNELS, 0))
    forbidden = ~np.all(np.isfinite(edge_values), axis=0)
    edge_values[:, forbidden] = 0.0
    pair_edges: dict[tuple[int, int], list[int]] = {}
    for e, edge in enumerate(table.edges):
        pair_edges.setdefault((min(edge.source, edge.target), max(edge.source, edge.target)), []).append(e)
    scopes = [pair for pair in sorted(pair_edges) if pair[0] != pair[1]]
    return Problem(
        table=table,
        kept=tuple(kept),
        offsets=offsets,
        node_of=np.repeat(np.arange(len(kept)), sizes),
        values=values,
        node_count=_count([n.blocks for n in table.nodes], table.num_blocks),
        ends=tuple((e.source, e.target) for e in table.edges),
        edge_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        edge_of=np.repeat(np.arange(len(table.edges)), lengths),
        edge_values=edge_values,
        forbidden=forbidden,
        edge_count=_count([e.blocks for e in table.edges], table.num_blocks),
        pair_edges={pair: tuple(pair_edges[pair]) for pair in sorted(pair_edges)},
        plan=_plan(tuple(map(int, sizes)), scopes),
        foreign=foreign_reads(table),
        cache={},
    )


def join_problems(parts: Sequence[Problem], links: Mapping[tuple[int, int], Link]) -> Problem:
    """The problem of a mixed cluster from those of its types, whose tables have the same structure."""
    first = parts[0]
    pays = [part.values[:NUM_EDGE_CHANNELS] for part in parts[1:]]
    return replace(
        first,
        values=np.concatenate([first.values, *pays]),
        edge_values=np.concatenate([part.edge_values for part in parts]),
        cache={},
        parts=tuple(parts),
        links=links,
    )


def _plan(sizes: tuple[int, ...], scopes: Sequence[tuple[int, int]]) -> Plan:
    """Full elimination, or elimination of degree <= 2 if tables grow too large (then a core remains for HiGHS)."""
    plan = make_plan(sizes, scopes, TABLE_CAP)
    return make_plan(sizes, scopes, TABLE_CAP, max_scope=2) if plan.core else plan


def solve_core(run: Elimination) -> tuple[float, tuple[int, ...] | None]:
    """Bound and choice of a run whose core HiGHS solves."""
    result, core_choice = solve_ilp(core_network(run))
    if core_choice is None:
        return result.bound, None
    choice = [0] * len(run.plan.sizes)
    for node, strategy in zip(run.plan.core, core_choice, strict=True):
        choice[node] = strategy
    return run.value + result.bound, back_substitute(run, choice)


def _key(weights: Weights) -> bytes:
    parts = [weights.blocks.tobytes()]
    for group in (weights.nodes, weights.extra):
        for node, vector in sorted(group.items()):
            parts += [str(node).encode(), vector.tobytes()]
        parts.append(b"|")
    return b"".join(parts)


def _count(blocks: Sequence[tuple[int, ...]], num_blocks: int) -> Array:
    """[entries, num_blocks + 1]: how often each entry occurs in each block; SHARED is the last column."""
    count = np.zeros((len(blocks), num_blocks + 1))
    for row, entry in enumerate(blocks):
        np.add.at(count[row], [num_blocks if b == SHARED else b for b in entry], 1.0)
    return count


def pay_values(
    table: CostTable, forward_s: Array, backward_s: Array, microbatch_j: Array, *, step_s: Array, step_j: Array
) -> Array:
    """[TIME, REDO, ENERGY, REDO_ENERGY] of strategies; any leading dims."""
    num_microbatches, num_devices = table.num_microbatches, table.mesh.num_devices
    energy = num_devices * num_microbatches * microbatch_j
    return np.array(
        [
            forward_s + backward_s + step_s / num_microbatches,
            np.broadcast_to(forward_s, backward_s.shape),
            energy + num_devices * step_j,
            energy * redo_share(forward_s, backward_s),
        ]
    )


def _node_values(table: CostTable, kept: Sequence[Index]) -> Array:
    def flat(name: str) -> Array:
        return np.concatenate([getattr(node, name)[keep] for node, keep in zip(table.nodes, kept, strict=True)])

    pay = pay_values(
        table, flat("forward_s"), flat("backward_s"), flat("microbatch_j"), step_s=flat("step_s"), step_j=flat("step_j")
    )
    activations, boundary = flat("activation_bytes"), flat("boundary_bytes")
    kept_bytes = [flat("state_bytes"), activations, boundary, np.minimum(activations, boundary)]
    return np.concatenate([pay, np.array([*kept_bytes, flat("workspace_bytes")])])


def _edge_values(table: CostTable, edge: CostEdge, kept: Sequence[Index]) -> Array:
    grid = np.ix_(kept[edge.source], kept[edge.target])
    forward_s, backward_s = edge.forward_s[grid], edge.backward_s[grid]
    energy = edge.microbatch_j[grid] * (table.mesh.num_devices * table.num_microbatches)
    with np.errstate(invalid="ignore"):
        redo_energy = energy * redo_share(forward_s, backward_s)
    rows = np.array([forward_s + backward_s, forward_s, energy, redo_energy])
    return rows.reshape(NUM_EDGE_CHANNELS, -1)


def _arc_consistent(table: CostTable) -> list[Index]:
    """Strategies of every node that have a finite partner on every edge, to a fixed point."""
    alive = [np.isfinite(n.forward_s + n.backward_s) for n in table.nodes]
    legal = {}
    for e, edge in enumerate(table.edges):
        finite = np.isfinite(edge.forward_s + edge.backward_s)
        if not finite.all():
            legal[e] = finite
    changed = True
    while changed:
        changed = False
        for e, finite in legal.items():
            i, j = table.edges[e].source, table.edges[e].target
            if i == j:
                new_i = new_j = alive[i] & np.diagonal(finite)
            else:
                new_i = alive[i] & finite[:, alive[j]].any(axis=1)
                new_j = alive[j] & finite[new_i, :].any(axis=0)
            if (new_i != alive[i]).any() or (new_j != alive[j]).any():
                alive[i], alive[j], changed = new_i, new_j, True
    return [np.flatnonzero(a) for a in alive]
