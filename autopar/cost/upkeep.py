"""Upkeep of parameters: what keeping, gathering, synchronising and updating them costs, for all choices at once.

Bytes follow the software's precision (`ir.software`): a parameter of E elements in the graph's dtype keeps

    copy (unless only a master is kept) + gradient      cut as it is stored
    master + optimizer states                           cut as its optimizer is

on each device. Where the software hides collectives behind computation, nodes carry them in full as `traffic`, which
`cost.predict` lays on streams; what the search is charged is the part that cannot hide, since a collective of g
seconds beside computation of c seconds shows at least max(g - c, slowdown * g).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.cost.collective import LinearCost, collective_cost
from autopar.cost.hardware import Cluster
from autopar.cost.layouts import Codes, Mask
from autopar.cost.memory import BUCKET_BYTES, held_bytes, optimizer_states
from autopar.cost.power import byte_energy_j
from autopar.cost.pricing import NodePrice, free_node
from autopar.cost.roofline import memory_rate
from autopar.cost.shards import Sizes
from autopar.cost.sheets import KeptParameters, ParameterSheet
from autopar.ir.cost import Array, Traffic
from autopar.ir.mesh import StageMesh
from autopar.ir.software import Software


@dataclass(frozen=True)
class Upkeep:
    """Bytes of parameters on one device, per choice."""

    whole: Array
    weights: Array
    gradients: Array
    optimizer: Array
    reduced: Array
    update: Array


class ParameterPricer:
    """Prices parameter nodes on one cluster, run by `software`."""

    def __init__(self, cluster: Cluster, optimizer: str, training: bool, software: Software) -> None:
        self.cluster = cluster
        self.spec = cluster.spec
        self.training = training
        self.states = optimizer_states(optimizer) if training else 0
        self.software = software

    def bytes_of(self, sheet: ParameterSheet, found: KeptParameters, sizes: Sizes) -> Upkeep:
        """What the choices keep and move."""
        at, own = found.stored.choices, found.stored.owner
        whole = sizes.num_bytes[sheet.tensor][own]
        held = held_bytes(whole, sheet.item_bytes[own], self.states, self.software)
        stored, optimizer = found.stored.parts[at], found.optimizer_parts[at]
        trained = sheet.requires_grad[own] & self.training
        return Upkeep(
            whole,
            np.where(trained, held.weights, whole) / stored,
            np.where(trained, held.gradient / stored, 0.0),
            np.where(trained, held.optimizer / optimizer, 0.0),
            held.reduced / stored,
            held.update / optimizer,
        )

    def price(
        self, sheet: ParameterSheet, found: KeptParameters, sizes: Sizes, mesh: StageMesh,
        *, gathering: Array, compute_s: Array,
    ) -> NodePrice:  # fmt: skip
        """Parameters under every kept choice.

        Args:
            sheet: all choices.
            found: those kept.
            sizes: of tensors.
            mesh: for group sizes.
            gathering: [choice, terms] of gathering the exposed from the stored parameter (see `transfers`). What is
                gathered stays until the block's forward is over, so a gathered parameter takes room for its whole
                block, and for its gradient.
            compute_s: [parameter], seconds that the block around it computes, forward, spread over all devices.
        """
        at, own = found.stored.choices, found.stored.owner
        held = self.bytes_of(sheet, found, sizes)
        exposed = held.whole / found.exposed_parts[at]
        price, terms, moved = free_node(len(at)), gathering[at], sheet.regathered[at]
        trained = sheet.requires_grad[own] & self.training
        price.forward_s = terms[:, 0] + held.whole * terms[:, 1]
        again = np.where(moved & trained, price.forward_s, 0.0)
        scatter = np.where(trained, terms[:, 2] + held.whole * terms[:, 3], 0.0)
        price.backward_s = again + scatter
        price.microbatch_j = held.whole * terms[:, 4] + np.where(trained & moved, 0.5 * held.whole * terms[:, 4], 0.0)
        room = exposed * sheet.block_bytes[own] / np.maximum(held.whole, 1.0)
        price.workspace_bytes = np.where(moved, room, 0.0) + np.where(trained & moved, exposed, 0.0)
        price.state_bytes = held.weights + held.gradients + held.optimizer
        self._synchronise(price, (sheet.reduced[at], sheet.scattered[at]), mesh, held.reduced)
        sync = np.where(trained, price.step_s, 0.0)
        update = np.where(trained, held.update / memory_rate(self.spec), 0.0)
        price.step_s = sync + update
        price.step_j = np.where(trained, price.step_j + held.update * byte_energy_j(self.spec), 0.0)
        self._hide(price, Traffic(price.forward_s, again, scatter, sync, update), sheet, own, compute_s)
        return price

    def _hide(self, price: NodePrice, traffic: Traffic, sheet: ParameterSheet, own: Codes, compute_s: Array) -> None:
        """Leaves in the price what must show, and keeps the traffic in full."""
        software, slowdown = self.software, self.spec.overlap_slowdown
        if not (software.prefetch_parameters or software.overlap_gradients):
            return
        price.traffic = traffic
        beside_s = (sheet.whole_share * compute_s)[own]
        if software.prefetch_parameters:
            price.forward_s = price.forward_s * visible_share(traffic.gather_s, beside_s, slowdown)
            moved_s = traffic.regather_s + traffic.scatter_s
            price.backward_s = moved_s * visible_share(moved_s, 2 * beside_s, slowdown)
        if software.overlap_gradients:
            price.step_s = traffic.sync_s * visible_share(traffic.sync_s, 2 * beside_s, slowdown) + traffic.update_s

    def _synchronise(self, price: NodePrice, masks: tuple[Mask, Mask], mesh: StageMesh, gradient: Array) -> None:
        """Adds gradient all_reduce (`replicated`) and reduce_scatter with all_gather (`zero1`), axis by axis."""
        local = gradient.copy()
        for axis, size in enumerate(mesh.sizes):
            if size == 1:
                continue
            group = mesh.group(axis)
            parts = [collective_cost(self.cluster, kind, group) for kind in ("reduce_scatter", "all_gather")]
            pair = LinearCost(
                sum(p.latency_s for p in parts), sum(p.s_per_byte for p in parts), sum(p.j_per_byte for p in parts)
            )
            reduced, scattered = (mask[:, axis] for mask in masks)
            for mask, cost in ((reduced, collective_cost(self.cluster, "all_reduce", group)), (scattered, pair)):
                latency = cost.latency_s * np.minimum(1.0, local / BUCKET_BYTES)
                price.step_s = price.step_s + np.where(mask, latency + local * cost.s_per_byte, 0.0)
                price.step_j = price.step_j + np.where(mask, local * cost.j_per_byte, 0.0)
            local = np.where(scattered, local / size, local)


def visible_share(traffic_s: Array, compute_s: Array, slowdown: float) -> Array:
    """Part of collectives of `traffic_s` seconds that shows beside computation of `compute_s` seconds."""
    hidden = np.divide(compute_s, traffic_s, out=np.ones_like(traffic_s), where=traffic_s > 0)
    shown: Array = np.maximum(1.0 - hidden, slowdown)
    return shown
