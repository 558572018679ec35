"""Pricing of op, hub and parameter nodes for one mesh and microbatch size, as arrays over their choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autopar.cost.choices import OpChoices, ParameterChoices, keep
from autopar.cost.collective import LinearCost, collective_cost
from autopar.cost.device import DeviceSpec
from autopar.cost.hardware import Cluster
from autopar.cost.kernels import backward_kind, forward_bytes_weight, is_view, work_kind
from autopar.cost.layouts import Codes, Mask, divisors
from autopar.cost.memory import BUCKET_BYTES, optimizer_states, update_passes
from autopar.cost.power import byte_energy_j, dynamic_limit_w, kernel_energy_j, within_limit_s
from autopar.cost.roofline import kernel_time_s, memory_rate
from autopar.ir.cost import Array
from autopar.ir.graph import Op, Value
from autopar.ir.mesh import StageMesh
from autopar.ir.strategy import skewed_parts
from autopar.rules.experts import exchanged_bytes


@dataclass
class NodePrice:
    """Arrays of a `CostNode`, over the choices that remain."""

    forward_s: Array
    backward_s: Array
    step_s: Array
    microbatch_j: Array
    step_j: Array
    state_bytes: Array
    activation_bytes: Array
    boundary_bytes: Array
    workspace_bytes: Array


def free_node(num_choices: int) -> NodePrice:
    """A node that costs nothing."""
    return NodePrice(*(np.zeros(num_choices) for _ in range(9)))


@dataclass(frozen=True)
class OpLayout:
    """Choices of an op that divide evenly.

    Attributes:
        kept: positions in the op's grid.
        inputs, outputs: codes of every operand and result of the kept choices.
        input_parts, output_parts: into how many parts each tensor is cut.
        work_parts: into how many parts the FLOPs are cut.
        is_exchanged: [choice, axis], the op sends its operands to other ranks of the axis and its results back.
    """

    kept: Codes
    inputs: tuple[Codes, ...]
    outputs: tuple[Codes, ...]
    input_parts: tuple[Array, ...]
    output_parts: tuple[Array, ...]
    work_parts: Array
    is_exchanged: Mask


def lay_out(op: Op, choices: OpChoices, values: Mapping[str, Value], sizes: tuple[int, ...]) -> OpLayout:
    """Keeps what divides evenly (never nothing: `replicate` always divides)."""
    cut = [
        [divisors(codes, values[name].meta.shape, sizes) for codes, name in zip(group, names, strict=True)]
        for group, names in ((choices.inputs, op.inputs), (choices.outputs, op.outputs))
    ]
    even: Mask = np.ones(len(choices.grid.choices), dtype=np.bool_)
    for parts in (*cut[0], *cut[1]):
        even = even & parts[1]
    kept = np.flatnonzero(keep(even, choices.preferences))
    shares = np.where(choices.is_skewed[kept], [skewed_parts(size) for size in sizes], np.asarray(sizes, dtype=float))
    work = np.where(choices.splits_work[kept], shares, 1.0).prod(axis=1)
    return OpLayout(
        kept,
        tuple(codes[kept] for codes in choices.inputs),
        tuple(codes[kept] for codes in choices.outputs),
        tuple(parts[kept] for parts, _ in cut[0]),
        tuple(parts[kept] for parts, _ in cut[1]),
        work,
        choices.is_exchanged[kept],
    )


class Pricer:
    """Prices nodes on one cluster. `kept_shared`: see `skeleton.Skeleton`."""

    def __init__(self, cluster: Cluster, optimizer: str, training: bool, kept_shared: frozenset[str]) -> None:
        self.kept_shared = kept_shared
        self.cluster = cluster
        self.spec = cluster.spec
        self.slower = cluster.slower_specs()
        self.training = training
        self.states = optimizer_states(optimizer) if training else 0
        self.update_passes = update_passes(optimizer)

    def op(
        self, op: Op, layout: OpLayout, values: Mapping[str, Value], num_microbatches: int, mesh: StageMesh
    ) -> NodePrice:
        """An op under every kept choice.

        `values` have microbatch shapes; the op's own figures are those of `num_microbatches` microbatches.
        """
        price = free_node(len(layout.kept))
        reads = _local_bytes(op.inputs, layout.input_parts, values)
        writes = _local_bytes(op.outputs, layout.output_parts, values)
        forward, backward = self._traffic(op, layout, values, reads, writes)
        kind, dtype = work_kind(op), _compute_dtype(op, values)
        price.forward_s, forward_j = self._kernels(
            kind, dtype, op.flops_forward / num_microbatches / layout.work_parts, forward,
            0.0 if is_view(op, values) else 1.0,
        )  # fmt: skip
        price.microbatch_j = forward_j
        wanted = sum(values[name].requires_grad for name in dict.fromkeys(op.inputs))
        if self.training and wanted and any(values[name].requires_grad for name in op.outputs):
            kernels = 0.0 if is_view(op, values) and backward_kind(op) == "none" else 1.0
            if kind != "other":
                kernels *= wanted
            price.backward_s, backward_j = self._kernels(
                kind, dtype, op.flops_backward / num_microbatches / layout.work_parts, backward, kernels
            )
            price.microbatch_j = forward_j + backward_j
            price.activation_bytes = self._saved(op, layout, values, num_microbatches)
        if not is_view(op, values):
            price.workspace_bytes = sum(writes, np.zeros(len(layout.kept))) + self._gradient_bytes(op, reads, values)
        if np.any(layout.is_exchanged):
            self._exchange(price, op, layout, values, mesh)
        return price

    def _exchange(
        self, price: NodePrice, op: Op, layout: OpLayout, values: Mapping[str, Value], mesh: StageMesh
    ) -> None:
        """Adds the two all_to_alls inside the op, forward, and as many backward; the rows there need room too."""
        num_bytes = exchanged_bytes(op, values) / layout.work_parts
        for axis in np.flatnonzero(layout.is_exchanged.any(axis=0)).tolist():
            cost = collective_cost(self.cluster, "all_to_all", mesh.group(axis))
            on = layout.is_exchanged[:, axis]
            time_s = np.where(on, 2 * cost.latency_s + num_bytes * cost.s_per_byte, 0.0)
            price.forward_s = price.forward_s + time_s
            price.backward_s = price.backward_s + (time_s if self.training else 0.0)
            price.microbatch_j = price.microbatch_j + (2 if self.training else 1) * np.where(
                on, num_bytes * cost.j_per_byte, 0.0
            )
            price.workspace_bytes = price.workspace_bytes + np.where(on, num_bytes, 0.0)

    def _gradient_bytes(self, op: Op, reads: list[Array], values: Mapping[str, Value]) -> Array:
        total = np.zeros_like(reads[0]) if reads else np.zeros(1)
        if self.training:
            for name, size in zip(op.inputs, reads, strict=True):
                if values[name].requires_grad:
                    total = total + size
        return total

    def _traffic(
        self, op: Op, layout: OpLayout, values: Mapping[str, Value], reads: list[Array], writes: list[Array]
    ) -> tuple[Array, Array]:
        """Bytes that forward and backward move."""
        zero = np.zeros(len(layout.kept))
        whole = sum((*reads, *writes), zero)
        forward = sum((forward_bytes_weight(op, i) * size for i, size in enumerate(reads)), zero) + sum(writes, zero)
        made = {name for member in op.members for name in member.outputs} - set(op.outputs)
        inner = sum(values[name].meta.num_bytes for name in sorted(made) if values[name].root == name)
        inside = 2.0 * inner / layout.work_parts
        scale = {"none": 0.0, "whole": 1.0, "double": 2.0}[backward_kind(op)]
        return (zero if is_view(op, values) else forward + inside), scale * (whole + inside)

    def _kernels(
        self, kind: str, dtype: str, flops: Array, num_bytes: Array, num_kernels: float
    ) -> tuple[Array, Array]:
        """Seconds and dynamic joules at the highest clock that keeps the power limit, up to the device's own."""
        time_s, energy_j = _kernel(self.spec, kind, dtype, flops=flops, num_bytes=num_bytes, num_kernels=num_kernels)
        limit_w = dynamic_limit_w(self.spec)
        for slower in self.slower if num_kernels else ():
            above = energy_j > time_s * limit_w
            if not above.any():
                break
            found = _kernel(slower, kind, dtype, flops=flops, num_bytes=num_bytes, num_kernels=num_kernels)
            time_s, energy_j = np.where(above, found[0], time_s), np.where(above, found[1], energy_j)
        return within_limit_s(self.spec, time_s, energy_j), energy_j

    def _saved(self, op: Op, layout: OpLayout, values: Mapping[str, Value], num_microbatches: int) -> Array:
        """Bytes kept for backward: the storage behind each saved value, which a view keeps alive as a whole.

        Every rank holds whole batch inputs. Shared results and parameters are counted where they are made.
        """
        total = op.saved_extra_bytes / num_microbatches / layout.work_parts
        parts = dict(zip(op.inputs, layout.input_parts, strict=True))
        parts |= dict(zip(op.outputs, layout.output_parts, strict=True))
        for name in op.saved:
            root = values[values[name].root]
            if root.origin == "input":
                total = total + root.meta.num_bytes
            elif root.origin == "op" and root.name not in self.kept_shared and name in parts:
                total = total + root.meta.num_bytes / parts[name]
        return total

    def parameter(
        self, value: Value, choices: ParameterChoices, mesh: StageMesh, *, traffic: Array, block_bytes: int
    ) -> tuple[Codes, NodePrice]:
        """Positions of the choices that divide evenly, and their prices.

        Args:
            value: the parameter.
            choices: all choices.
            mesh: for group sizes.
            traffic: [choice, terms] of gathering the exposed from the stored parameter (see `transfers`).
            block_bytes: of all parameters of its block. What is gathered stays until the block's forward is over,
                so a gathered parameter takes room for its whole block, and for its gradient.
        """
        sizes, whole = mesh.sizes, float(value.meta.num_bytes)
        cuts = [divisors(c, value.meta.shape, sizes) for c in (choices.storage, choices.exposed, choices.optimizer)]
        even: Mask = cuts[0][1] & cuts[1][1] & cuts[2][1]
        kept = np.flatnonzero(keep(even, choices.preferences))
        stored, exposed, optimizer = (whole / parts[kept] for parts, _ in cuts)
        price, terms = free_node(len(kept)), traffic[kept]
        gathers = terms[:, 0] + whole * terms[:, 1]
        again = np.where(choices.regathered[kept], gathers, 0.0)
        price.forward_s, price.state_bytes = gathers, stored
        price.microbatch_j = whole * terms[:, 4]
        moved = choices.regathered[kept]
        price.workspace_bytes = np.where(moved, exposed * block_bytes / max(whole, 1.0), 0.0)
        if self.training and value.requires_grad:
            price.backward_s = again + terms[:, 2] + whole * terms[:, 3]
            price.microbatch_j = price.microbatch_j + np.where(moved, 0.5 * whole * terms[:, 4], 0.0)
            price.workspace_bytes = price.workspace_bytes + np.where(moved, exposed, 0.0)
            price.state_bytes = 2 * stored + self.states * optimizer
            self._synchronise(price, choices, kept, mesh, stored)
            update = self.update_passes * optimizer
            price.step_s = price.step_s + update / memory_rate(self.spec)
            price.step_j = price.step_j + update * byte_energy_j(self.spec)
        return kept, price

    def _synchronise(
        self, price: NodePrice, choices: ParameterChoices, kept: Codes, mesh: StageMesh, gradient: Array
    ) -> None:
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
            reduced, scattered = choices.reduced[kept, axis], choices.scattered[kept, axis]
            for mask, cost in ((reduced, collective_cost(self.cluster, "all_reduce", group)), (scattered, pair)):
                latency = cost.latency_s * np.minimum(1.0, local / BUCKET_BYTES)
                price.step_s = price.step_s + np.where(mask, latency + local * cost.s_per_byte, 0.0)
                price.step_j = price.step_j + np.where(mask, local * cost.j_per_byte, 0.0)
            local = np.where(scattered, local / size, local)


def _kernel(
    spec: DeviceSpec, kind: str, dtype: str, *, flops: Array, num_bytes: Array, num_kernels: float
) -> tuple[Array, Array]:
    """Seconds and dynamic joules at the device's clock, whatever it draws."""
    time_s = kernel_time_s(spec, kind, dtype, flops=flops, num_bytes=num_bytes, num_kernels=num_kernels)
    if num_kernels == 0:
        return time_s, np.zeros_like(time_s)
    return time_s, kernel_energy_j(spec, kind, dtype, flops, num_bytes)


def _local_bytes(names: tuple[str, ...], parts: tuple[Array, ...], values: Mapping[str, Value]) -> list[Array]:
    """Local bytes of each tensor; a name that stands twice is moved once."""
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    return [
        values[name].meta.num_bytes / cut * (1.0 if first[name] == i else 0.0)
        for i, (name, cut) in enumerate(zip(names, parts, strict=True))
    ]


def _compute_dtype(op: Op, values: Mapping[str, Value]) -> str:
    """Dtype of the first floating operand, else of the first result."""
    metas = [values[name].meta for name in (*op.inputs, *op.outputs)]
    return next((meta.dtype for meta in metas if meta.is_floating), "float32")
