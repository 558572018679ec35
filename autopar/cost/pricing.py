"""Pricing of ops for one mesh and microbatch size, as arrays over the choices of all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.cost.collective import collective_cost
from autopar.cost.hardware import Cluster
from autopar.cost.shards import Sizes
from autopar.cost.sheets import Kept, OpSheet
from autopar.cost.work import COMPILED_DISPATCH, Work, clocked, kernels, launches_s, work_parts, works
from autopar.ir.cost import Array, Outside, Traffic
from autopar.ir.mesh import StageMesh
from autopar.ir.software import Software


@dataclass
class NodePrice:
    """Arrays of `CostNode`s, over the choices that remain."""

    forward_s: Array
    backward_s: Array
    step_s: Array
    microbatch_j: Array
    step_j: Array
    state_bytes: Array
    activation_bytes: Array
    boundary_bytes: Array
    workspace_bytes: Array
    traffic: Traffic | None = None
    outside: Outside | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """All arrays but those of the traffic and of what is outside, by name."""
        return {name: value for name, value in vars(self).items() if name not in ("traffic", "outside")}

    def part(self, start: int, stop: int) -> NodePrice:
        """Views of the choices of one node."""
        traffic = None if self.traffic is None else self.traffic.part(start, stop)
        return NodePrice(
            **{name: array[start:stop] for name, array in self.arrays.items()}, traffic=traffic, outside=None
        )


def rerun(forward_s: Array, backward_s: Array, energy_j: Array, times: Array) -> tuple[Array, Array]:
    """Backward seconds and joules of one microbatch, where forward runs so many times again in backward."""
    total = forward_s + backward_s
    share = np.divide(forward_s, total, out=np.zeros_like(total), where=total > 0)
    return backward_s + times * forward_s, energy_j * (1.0 + times * share)


def free_node(num_choices: int) -> NodePrice:
    """Choices that cost nothing."""
    return NodePrice(*np.zeros((9, num_choices)))


class Pricer:
    """Prices op nodes on one cluster, run by `software`."""

    def __init__(self, cluster: Cluster, training: bool, software: Software) -> None:
        self.cluster = cluster
        self.spec = cluster.spec
        self.slower = cluster.slower_specs()
        self.limiting = cluster.limiting_specs()
        self.training = training
        self.software = software
        self.dispatch_s = self.spec.dispatch_s * (COMPILED_DISPATCH if software.fusion == "compiled" else 1.0)

    def ops(self, sheet: OpSheet, kept: Kept, sizes: Sizes, mesh: StageMesh, count: int) -> NodePrice:
        """Every op under every kept choice; `sizes` and figures are those of one of `count` microbatches."""
        price, facts, op = free_node(len(kept.owner)), sheet.facts, kept.owner
        forward, backward = self._works(sheet, kept, sizes, mesh, count)
        (price.forward_s, forward_j), (price.backward_s, backward_j) = (
            self._kernels(sheet, kept, work) for work in (forward, backward)
        )
        price.microbatch_j = forward_j + backward_j
        share = np.where(facts.has_batch, float(count), 1.0)
        extra = (facts.saved_extra_bytes / share)[op] / work_parts(sheet, kept, mesh.sizes)
        price.activation_bytes, returning = self._saved(sheet, kept, sizes, extra, mesh)
        row_bytes = sizes.num_bytes[sheet.rows.tensor] / kept.parts
        moved = np.add.reduceat(row_bytes * (sheet.written + sheet.gradients), sheet.row_starts)[kept.choices]
        price.workspace_bytes = np.where(facts.is_view[op], 0.0, moved) + _room(sheet, kept, returning)
        self._exchange(price, sheet, kept, sizes, mesh)
        return price

    def kernels_by_clock(
        self, sheet: OpSheet, kept: Kept, sizes: Sizes, mesh: StageMesh, count: int
    ) -> tuple[Array, Array, Array]:
        """Forward seconds, backward seconds and joules [clock, choice] of kernels alone, at each clock."""
        passes = self._works(sheet, kept, sizes, mesh, count)
        (forward_s, forward_j), (backward_s, backward_j) = (self._clocked(sheet, kept, work) for work in passes)
        return forward_s, backward_s, forward_j + backward_j

    def _works(self, sheet: OpSheet, kept: Kept, sizes: Sizes, mesh: StageMesh, count: int) -> tuple[Work, Work]:
        return works(self.spec, sheet, kept, sizes, axis_sizes=mesh.sizes, count=count)

    def _exchange(self, price: NodePrice, sheet: OpSheet, kept: Kept, sizes: Sizes, mesh: StageMesh) -> None:
        """Adds the two all_to_alls inside the op, forward, and as many backward; the rows there need room too."""
        found = sheet.is_exchanged[kept.choices]
        for axis in np.flatnonzero(found.any(axis=0)).tolist():
            on = np.flatnonzero(found[:, axis])
            op, tensor, times = sheet.exchanged.T
            whole = np.bincount(op, sizes.num_bytes[tensor] * times, len(sheet.facts.is_view))
            num_bytes = whole[kept.owner[on]] / work_parts(sheet, kept, mesh.sizes)[on]
            cost = collective_cost(self.cluster, "all_to_all", mesh.group(axis))
            time_s = 2 * cost.latency_s + num_bytes * cost.s_per_byte
            price.forward_s[on] += time_s
            price.backward_s[on] += time_s if self.training else 0.0
            price.microbatch_j[on] += (2 if self.training else 1) * num_bytes * cost.j_per_byte
            price.workspace_bytes[on] += num_bytes

    def _kernels(self, sheet: OpSheet, kept: Kept, work: Work) -> tuple[Array, Array]:
        """Seconds and dynamic joules, up to the device's own clock."""
        time_s, energy_j = kernels((self.spec, *self.limiting), sheet, kept, work)
        return time_s + launches_s(self.dispatch_s, sheet, kept, work, time_s), energy_j

    def _clocked(self, sheet: OpSheet, kept: Kept, work: Work) -> tuple[Array, Array]:
        """As `_kernels`, at each of the cluster's clocks."""
        limited = kernels((self.spec, *self.limiting), sheet, kept, work)
        time_s, energy_j = clocked((self.spec, *self.slower), limited, sheet, kept, work)
        return np.stack([row + launches_s(self.dispatch_s, sheet, kept, work, row) for row in time_s]), energy_j

    def _saved(self, sheet: OpSheet, kept: Kept, sizes: Sizes, extra: Array, mesh: StageMesh) -> tuple[Array, Array]:
        """Bytes kept for backward, the storage behind each saved value, which a view keeps alive as a whole; and those
        that are there again while backward works on the block.

        Every rank holds whole batch inputs. Shared results are counted where they are made, parameters elsewhere.
        A product whose choice splits the work and reads an operand whole keeps that beside the part that the operand's
        maker keeps.
        """
        facts, reruns = sheet.facts, sheet.reruns
        parts = kept.parts * np.where(sheet.gathers_again, np.asarray(mesh.sizes, float), 1.0).prod(axis=1)
        root_bytes = np.where(sheet.saved_root >= 0, sizes.num_bytes[sheet.saved_root], 0.0) / parts
        own, again = (
            np.add.reduceat(root_bytes * share, sheet.row_starts)[kept.choices]
            for share in (sheet.kept_share, sheet.kept_share < 1.0)
        )
        own = (
            own
            + np.add.reduceat(sizes.num_bytes[sheet.rows.tensor] / kept.parts * sheet.copied, sheet.row_starts)[
                kept.choices
            ]
        )
        whole = np.zeros(len(facts.is_view))
        np.add.at(whole, facts.whole_saved[:, 0], sizes.num_bytes[facts.whole_saved[:, 1]])
        stays, is_back = reruns.extra[kept.owner], facts.keeps[kept.owner]
        saved: Array = np.where(is_back, stays * extra + own, 0.0) + whole[kept.owner]
        returning: Array = np.where(is_back, (stays < 1.0) * extra + again, 0.0)
        return saved, returning


def _room(sheet: OpSheet, kept: Kept, returning: Array) -> Array:
    """Bytes that the recomputed values of the block take beside each op: its own, and the least of all others."""
    block = sheet.reruns.block
    if sheet.reruns.is_empty:
        return np.zeros_like(returning)
    least = np.minimum.reduceat(returning, kept.starts[:-1])
    total = np.bincount(block[block >= 0], least[block >= 0])
    others = np.where(block >= 0, total[block] - least, 0.0)
    room: Array = others[kept.owner] + returning
    return room
