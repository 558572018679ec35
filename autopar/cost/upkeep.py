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

from autopar.cost.collective import collective_cost
from autopar.cost.hardware import Cluster
from autopar.cost.layouts import Codes, Mask
from autopar.cost.memory import BUCKET_BYTES, Synced, held_bytes, optimizer_states, synced
from autopar.cost.offload import OffloadPrice, shard_bytes
from autopar.cost.power import byte_energy_j
from autopar.cost.pricing import NodePrice, free_node
from autopar.cost.roofline import memory_rate
from autopar.cost.shards import Sizes
from autopar.cost.sheets import KeptParameters, ParameterSheet
from autopar.cost.skeleton import Skeleton
from autopar.ir.cost import Array, Traffic
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.software import Software


@dataclass(frozen=True)
class Place:
    """Where a parameter is used.

    Attributes:
        home: block of its node.
        readers: blocks that read it, home included.
        next_bytes: of the parameters of the block before, which comes next in backward.
    """

    home: int
    readers: tuple[int, ...]
    next_bytes: float


def parameter_places(graph: OpGraph, skeleton: Skeleton) -> tuple[Place, ...]:
    """Of every parameter node of the skeleton, in order."""
    readers: dict[str, set[int]] = {}
    for op in graph.ops:
        for name in op.inputs if not op.is_shared else ():
            readers.setdefault(name, set()).add(op.block)
    templates = [template for template in skeleton.nodes if template.kind == "param"]
    in_block = [0.0] * len(graph.blocks)
    for template in templates:
        for block in template.blocks:
            in_block[block] += graph.values[template.representative].meta.num_bytes
    found = []
    for template in templates:
        blocks = tuple(sorted({template.blocks[0], *readers.get(template.representative, ())}))
        last = max(template.blocks[-1], blocks[-1])
        found.append(Place(template.blocks[0], blocks, in_block[last - 1] if last else 0.0))
    return tuple(found)


ALONE_BYTES = 2**20
"""Shards below this size share one gather with the others of their block, and one scatter: a small parameter pays its
share of one collective's latency (`program.gathered`)."""


@dataclass(frozen=True)
class Around:
    """What else goes on in the block of each parameter; arrays are [parameter].

    Attributes:
        compute_s: seconds that the block computes, forward, spread over all devices.
        work_bytes: what the hungriest op of the block needs at the least.
        makes_loss: the loss is among its ops: its hungriest op comes before any gradient.
        next_bytes: parameters of the block whose gather overlaps this block's backward.
        num_microbatches: in a step.
    """

    compute_s: Array
    work_bytes: Array
    makes_loss: Mask
    next_bytes: Array
    num_microbatches: int


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

    def __init__(
        self, cluster: Cluster, optimizer: str, training: bool, software: Software, total_bytes: float,
        *, offload: OffloadPrice | None = None, state_bytes: float = 0.0,
    ) -> None:  # fmt: skip
        """`total_bytes` are those of all gradients together, `state_bytes` of what the optimizer keeps."""
        self.cluster = cluster
        self.total_bytes = total_bytes
        self.spec = cluster.spec
        self.training = training
        self.optimizer = optimizer
        self.states = optimizer_states(optimizer) if training else 0
        self.software = software
        self.offload = offload
        self.optimizer_bytes = state_bytes if training else 0.0

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
            np.where(trained, held.gradient / (stored * found.early_parts[at]), 0.0),
            np.where(trained, held.optimizer / optimizer, 0.0),
            held.reduced / stored,
            held.update / optimizer,
        )

    def price(
        self, sheet: ParameterSheet, found: KeptParameters, sizes: Sizes, mesh: StageMesh,
        *, gathering: Array, around: Around,
    ) -> NodePrice:  # fmt: skip
        """Parameters under every kept choice.

        Args:
            sheet: all choices.
            found: those kept.
            sizes: of tensors.
            mesh: for group sizes.
            gathering: [choice, terms] of gathering the exposed from the stored parameter (see `transfers`).
            around: what the block does meanwhile.
        """
        at, own = found.stored.choices, found.stored.owner
        held = self.bytes_of(sheet, found, sizes)
        exposed = held.whole / found.exposed_parts[at]
        price, terms, moved = free_node(len(at)), gathering[at], sheet.regathered[at]
        trained = sheet.requires_grad[own] & self.training
        latency = np.where(held.weights < ALONE_BYTES, sheet.whole_share[own], 1.0)
        price.forward_s = latency * terms[:, 0] + held.whole * terms[:, 1]
        again = np.where(moved & trained, price.forward_s, 0.0)
        scatter = np.where(trained, latency * terms[:, 2] + held.whole * terms[:, 3], 0.0)
        price.microbatch_j = held.whole * terms[:, 4] + np.where(trained & moved, 0.5 * held.whole * terms[:, 4], 0.0)
        room = np.where(moved, self._room(sheet, own, exposed, around), 0.0)
        price.workspace_bytes = np.maximum(room, self._bucket_room(held, sheet, found))
        price.state_bytes = held.weights + held.gradients
        if self.offload is None or not self.offload.leaves:
            price.state_bytes = price.state_bytes + held.optimizer
        if self.offload is not None:
            total = self.optimizer_bytes / found.optimizer_parts[at]
            price.workspace_bytes = np.maximum(price.workspace_bytes, shard_bytes(held.optimizer, total))
        masks = sheet.reduced[at], sheet.scattered[at], sheet.early[at]
        scatter = scatter + self._synchronise(price, masks, mesh, held.reduced)
        price.backward_s = again + scatter
        sync = np.where(trained, price.step_s, 0.0)
        update = np.where(trained, self._update_s(held, found.optimizer_parts[at]), 0.0)
        price.step_s = sync + update
        moved_j = 0.0 if self.offload is None else 2.0 * held.optimizer * self.offload.j_per_byte
        price.step_j = np.where(trained, price.step_j + held.update * byte_energy_j(self.spec) + moved_j, 0.0)
        added = np.where(trained, self._added_bytes(held, around.num_microbatches), 0.0)
        adding_s = added / memory_rate(self.spec)
        traffic = Traffic(price.forward_s, again, scatter, sync, update, adding_s)
        self._hide(price, traffic, sheet, own, around.compute_s)
        price.backward_s = price.backward_s + adding_s
        price.microbatch_j = price.microbatch_j + added * byte_energy_j(self.spec)
        return price

    def _added_bytes(self, held: Upkeep, num_microbatches: int) -> Array:
        """Moved to add a microbatch's gradient to those of earlier ones, as far as it stays here: both are read, one is
        written. Software that never scatters gradients within a step adds them where it makes them (`moves.run_by`).
        """
        earlier = 1.0 - 1.0 / num_microbatches if self.software.prefetch_parameters else 0.0
        moved: Array = 3.0 * earlier * held.gradients
        return moved

    def _room(self, sheet: ParameterSheet, own: Codes, exposed: Array, around: Around) -> Array:
        """Bytes at work while the block of a gathered parameter runs backward.

        A gathered parameter takes room for its whole block, beside what the ops need. It goes about when its gradient
        comes, so that both together are little more than one block's; software that gathers ahead has the next block's
        too. A block's gradients are scattered together, and late: the last block's are under way until this one's are
        all there, then this one's, copied for it. They count as a block of gradients, in the precision of computation
        and in that of the reduction.
        """
        whole = np.maximum(sheet.block_bytes[own] * sheet.whole_share[own], 1.0)
        share, work, reduce = exposed / whole, around.work_bytes[own], self.software.reduce_bytes
        copies = 1.0 if reduce is None else 1.0 + reduce / sheet.item_bytes[own]
        ahead = around.next_bytes if self.software.prefetch_parameters else 0.0
        gathered, gradients = share * (sheet.block_bytes + ahead)[own], share * sheet.block_bytes[own] * copies
        gradients = np.where(sheet.requires_grad[own] & self.training, gradients, 0.0)
        beside = np.where(around.makes_loss[own], np.maximum(work, gradients), work + gradients)
        room: Array = gathered + beside
        return room

    def _bucket_room(self, held: Upkeep, sheet: ParameterSheet, found: KeptParameters) -> Array:
        """Bytes of the bucket of each gradient, at the most: as if all parameters were kept as this one is."""
        at = found.stored.choices
        parts = found.optimizer_parts[at] / found.stored.parts[at]
        reduced, scattered, early = (mask[at].any(axis=1) for mask in (sheet.reduced, sheet.scattered, sheet.early))
        own = synced(held.gradients * found.early_parts[at], reduced, scattered, parts, self.software, early=early)
        total = np.full(len(at), self.total_bytes)
        everything = Synced(
            np.where(own.summed > 0, total, 0.0),
            np.where(own.scattered > 0, total, 0.0),
            own.largest,
            np.where(own.scattered > 0, total / parts, 0.0),
            np.where(own.early > 0, total, 0.0),
            own.early_largest,
            np.where(own.early > 0, total / parts, 0.0),
        )
        room: Array = everything.room
        return room

    def _update_s(self, held: Upkeep, optimizer_parts: Array) -> Array:
        """As measured where it was; else the bytes that one fused kernel moves. Offloaded states come and go."""
        moved = 0.0 if self.offload is None else 2.0 * held.optimizer * self.offload.s_per_byte
        line = self.cluster.line(f"update:{self.optimizer}", 1)
        if line is None or self.software.name != Software().name:
            modelled: Array = held.update / memory_rate(self.spec) + moved
            return modelled
        measured: Array = line.latency_s + held.whole / optimizer_parts * line.s_per_byte + moved
        return measured

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

    def _synchronise(self, price: NodePrice, masks: tuple[Mask, Mask, Mask], mesh: StageMesh, gradient: Array) -> Array:
        """Adds gradient all_reduce (`replicated`) and reduce_scatter with all_gather (`zero1`), axis by axis.

        Returns the seconds of each microbatch in place of each step, where sums are early (`zero2`).
        """
        reduced, scattered, early = masks
        local, often, early_s = gradient.copy(), early.any(axis=1), np.zeros_like(gradient)
        for axis, size in enumerate(mesh.sizes):
            if size == 1:
                continue
            group = mesh.group(axis)
            for kind, mask in (("all_reduce", reduced), ("reduce_scatter", scattered), ("all_gather", scattered)):
                cost, is_early = collective_cost(self.cluster, kind, group), often & (kind != "all_gather")
                latency = cost.latency_s * np.minimum(1.0, local / BUCKET_BYTES)
                seconds = np.where(mask[:, axis], latency + local * cost.s_per_byte, 0.0)
                joules = np.where(mask[:, axis], local * cost.j_per_byte, 0.0)
                early_s += np.where(is_early, seconds, 0.0)
                price.microbatch_j = price.microbatch_j + np.where(is_early, joules, 0.0)
                price.step_s = price.step_s + np.where(is_early, 0.0, seconds)
                price.step_j = price.step_j + np.where(is_early, 0.0, joules)
            local = np.where(scattered[:, axis], local / size, local)
        return early_s


def visible_share(traffic_s: Array, compute_s: Array, slowdown: float) -> Array:
    """Part of collectives of `traffic_s` seconds that shows beside computation of `compute_s` seconds."""
    hidden = np.divide(compute_s, traffic_s, out=np.ones_like(traffic_s), where=traffic_s > 0)
    shown: Array = np.maximum(1.0 - hidden, slowdown)
    return shown
