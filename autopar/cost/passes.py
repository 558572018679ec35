"""Stage costs of plans that run in passes (`ir.passes`).

The last stage is priced as two: the blocks before the switch at the size of a microbatch, those behind at the size of a
pass, in place of the redistributions between them a send to every pass and a return of its gradient. Passes are laid on
streams (`ir.streams.pass_intervals`): sends and returns run beside the computation of other passes. All of that is part
of the stage's forward; its backward is that of the blocks before the switch.

Bytes of a send: of all samples of a pass, on every rank, B. By shares it is an all_gather and its return a
reduce_scatter. By turns one rank sends all of it, in a chain through the others: B over the bandwidth instead of
(n - 1) / n of that (broadcast and reduce of long vectors, Thakur, Rabenseifner, Gropp 2005). Collectives inside a pass
are counted as computation, as elsewhere; that they may queue behind a send is not modelled.

Memory: one pass's activations in place of a microbatch's, but beside them the samples of the next pass, the gradient of
the one before, and this rank's own samples with their gradient.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.cost.collective import LinearCost, collective_cost
from autopar.cost.stages import BlockBytes, StageCost, chosen, overlap_of, stage_costs
from autopar.cost.table import CostTables
from autopar.errors import PlanMismatchError
from autopar.ir.cost import CostTable
from autopar.ir.passes import EACH_PASS, TURNS, Passes
from autopar.ir.solution import Decisions
from autopar.ir.streams import Streams, pass_intervals, stage_times
from autopar.ir.timeline import StageTimes


def costs_at(tables: CostTables, decisions: Decisions, clock: int) -> tuple[StageCost, ...]:
    """Sums of every stage, all at one clock (index into those of the tables).

    Raises:
        PlanMismatchError: if the decisions do not fit the graph and mesh of `tables`.
    """
    passes, count = decisions.passes, decisions.num_microbatches
    table = _table(tables, decisions, count, clock)
    if passes is None:
        return stage_costs(tables, table, decisions)
    split = decisions.split_at_switch()
    part = _table(tables, decisions, count * passes.count, clock)
    *others, before, _ = stage_costs(tables, table, split)
    behind = stage_costs(tables, part, split, behind=passes.block)[-1]
    crossing = _crossing_bytes(table, decisions, passes.block)
    return (*others, _Joining(tables, decisions, passes, before, behind, crossing).join())


def _table(tables: CostTables, decisions: Decisions, count: int, clock: int) -> CostTable:
    table = tables.table(decisions.mesh, count)
    figures = tables.clock_figures(decisions.mesh, count) if clock else None
    if table is None:
        raise PlanMismatchError(f"the batch does not divide into {count} microbatches")
    return table if figures is None else figures.at(table, clock)


def _crossing_bytes(table: CostTable, decisions: Decisions, block: int) -> float:
    """Of this rank's samples of one microbatch."""
    choice = chosen(table, decisions)
    return sum(
        float(crossing.bytes_by_choice[choice[crossing.node]])
        for crossing in table.crossings
        if crossing.producer_block < block <= crossing.last_block
    )


class _Joining:
    """Makes one stage of the blocks before and behind a switch."""

    def __init__(  # noqa: PLR0917 - the parts of one thing
        self, tables: CostTables, decisions: Decisions, passes: Passes, before: StageCost, behind: StageCost, own: float
    ) -> None:
        self.tables, self.decisions, self.passes = tables, decisions, passes
        self.before, self.behind = before, behind
        self.own_bytes = own
        self.axis = [axis.name for axis in decisions.mesh.axes].index(passes.axis)
        self.pass_bytes = own * decisions.mesh.sizes[self.axis] / passes.count
        self.num_updates = decisions.num_microbatches * passes.count if passes.update == EACH_PASS else 1

    def join(self) -> StageCost:
        """The stage; see the module docstring."""
        before, behind, count = self.before, self.behind, self.passes.count
        works = {
            block: {**work, "forward_s": 0.0, "backward_s": 0.0, "update_s": work["update_s"] if self.is_exact else 0.0}
            for block, work in behind.blocks.items()
        }
        send, back = self._links()
        return replace(
            before,
            blocks={**before.blocks, **works},
            memory=self._memory(),
            times=self._times(works, send, back),
            passing=self._streams(send, back),
            microbatch_j=before.microbatch_j
            + count * (behind.microbatch_j + self.pass_bytes * (send.j_per_byte + back.j_per_byte)),
            step_j=before.step_j + self.num_updates * behind.step_j,
            activation_bytes=before.activation_bytes + behind.activation_bytes + self._room_bytes(),
            boundary_bytes=before.boundary_bytes + behind.boundary_bytes + self._room_bytes(),
            largest_block_bytes=max(before.largest_block_bytes, behind.largest_block_bytes),
            workspace_bytes=max(before.workspace_bytes, behind.workspace_bytes),
            op_workspace_bytes=max(before.op_workspace_bytes, behind.op_workspace_bytes),
            bucket_limit_bytes=max(before.bucket_limit_bytes, behind.bucket_limit_bytes),
            synced=before.synced + behind.synced,
            peak_w=max(before.peak_w, behind.peak_w),
            early_gradients=self._early_gradients(),
            state={cause: self._state_bytes(cause) for cause in before.state},
        )

    @property
    def is_exact(self) -> bool:
        return self.passes.update != EACH_PASS

    def _links(self) -> tuple[LinearCost, LinearCost]:
        """Costs of a send and of a return, by the bytes of a pass."""
        group = self.decisions.mesh.group(self.axis)
        kinds = ("all_gather", "reduce_scatter")
        send, back = (collective_cost(self.tables.cluster, kind, group) for kind in kinds)
        if self.passes.order != TURNS:
            return send, back
        whole = group.size / (group.size - 1)
        chain = [replace(c, s_per_byte=c.s_per_byte * whole, j_per_byte=c.j_per_byte * whole) for c in (send, back)]
        return chain[0], chain[1]

    def _streams(self, send: LinearCost, back: LinearCost) -> Streams:
        """Both streams during the passes over one microbatch."""
        update_s = 0.0 if self.is_exact else sum(work["update_s"] for work in self.behind.blocks.values())
        compute_s = sum(work.forward_s + work.backward_s for work in self.behind.works()) + update_s
        return pass_intervals(
            compute_s,
            send.time_s(self.pass_bytes),
            back.time_s(self.pass_bytes),
            self.passes.count,
            overlap_of(self.tables).slowdown,
        )

    def _times(self, works: dict[int, dict[str, float]], send: LinearCost, back: LinearCost) -> StageTimes:
        """Those of the blocks before, with what is left to do for those behind once a step, and the passes."""
        all_works = replace(self.before, blocks={**self.before.blocks, **works}).works()
        times = stage_times(all_works, overlap_of(self.tables))
        return replace(times, forward_s=times.forward_s + self._streams(send, back).stop_s)

    def _room_bytes(self) -> float:
        """Of what is under way, and of this rank's own samples and their gradient."""
        return min(2, self.passes.count - 1) * self.pass_bytes + 2 * self.own_bytes

    def _early_gradients(self) -> float:
        """Of the blocks behind, when the backward of those before begins; where each pass updates there are none then,
        but when a pass ends there are in place of its activations.
        """
        made = self.behind.state["gradients"]
        return made if self.is_exact else max(0.0, made - self.behind.activation_bytes)

    def _state_bytes(self, cause: str) -> float:
        """Gradients of the two parts are there by turns where each pass updates."""
        parts = self.before.state[cause], self.behind.state[cause]
        return max(parts) if cause == "gradients" and not self.is_exact else sum(parts)

    def _memory(self) -> dict[int, BlockBytes]:
        found = {**self.before.memory, **self.behind.memory}
        first = found[self.passes.block]
        room = self._room_bytes()
        found[self.passes.block] = replace(first, activations=first.activations + room, boundary=first.boundary + room)
        return found
