"""What the kernels of ops do, and how long that takes, as arrays over all kept choices at once.

Launching a kernel costs the CPU `dispatch_s` (less where a compiler has written the calls), which hides while the
device's queue is full. What shows is shared out evenly: in a block whose kernels, at their most divided, take G
seconds and whose launches take C, each launch shows 1 - G / C of its time, and nothing if G > C, so that the block
takes max(G, C) and the cost of an op stays its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.cost.device import DeviceSpec
from autopar.cost.layouts import Codes, Mask
from autopar.cost.power import dynamic_limit_w, kernel_energy_j, within_limit_s
from autopar.cost.roofline import backward_share, compute_s, gemm_s, kernel_time_s, memory_rate
from autopar.cost.shards import Sizes
from autopar.cost.sheets import Kept, OpSheet
from autopar.ir.cost import Array

COMPILED_DISPATCH = 0.5
"""CPU time of a launch from compiled code, over that of an eager op."""


@dataclass(frozen=True)
class Work:
    """One pass over all kept choices; `owner` is the op of each.

    `flops` counts for energy, `compute_s` is arithmetic at the highest clock; `num_bytes` move beside it and
    `apart_bytes` in kernels of their own.
    """

    owner: Codes
    flops: Array
    num_bytes: Array
    apart_bytes: Array
    kernels: Array
    compute_s: Array

    @property
    def is_done(self) -> Mask:
        """Whether there is anything to do: members of a fused kernel move bytes but launch nothing."""
        done: Mask = (self.kernels > 0) | (self.num_bytes + self.apart_bytes > 0) | (self.flops > 0)
        return done


def work_parts(sheet: OpSheet, kept: Kept, axis_sizes: tuple[int, ...]) -> Array:
    """Into how many parts each kept choice cuts the FLOPs."""
    at = kept.choices
    parts = np.asarray(axis_sizes, float)
    work: Array = np.where(sheet.splits_work[at], parts, 1.0).prod(axis=1)
    return work


def works(
    spec: DeviceSpec, sheet: OpSheet, kept: Kept, sizes: Sizes, *, axis_sizes: tuple[int, ...], count: int
) -> tuple[Work, Work]:
    """What forward and backward of every kept choice do in one of `count` microbatches."""
    facts, op = sheet.facts, kept.owner
    parts = work_parts(sheet, kept, axis_sizes)
    row_bytes = sizes.num_bytes[sheet.rows.tensor] / kept.parts

    def total(weights: Array) -> Array:
        found: Array = np.add.reduceat(row_bytes * weights, sheet.row_starts)[kept.choices]
        return found

    inner = np.zeros(len(facts.is_view))
    np.add.at(inner, facts.inner[:, 0], sizes.num_bytes[facts.inner[:, 1]])
    share = np.where(facts.has_batch, float(count), 1.0)
    extra = facts.saved_extra_bytes / share
    inside = (inner[:, None] * facts.inner_passes + extra[:, None])[op] / parts[:, None]
    flops = (facts.flops_forward / share)[op] / parts
    runs = facts.has_backward[op]
    back_flops = np.where(runs, (facts.flops_backward / share)[op] / parts, 0.0)
    earlier = 1.0 - 1.0 / count
    forward_s, backward_s = _compute_s(spec, sheet, kept, (flops, back_flops), row_bytes)
    forward = Work(
        op, flops, total(sheet.forward) + inside[:, 0], total(sheet.apart[0]), facts.forward_kernels[op], forward_s
    )
    backward = Work(
        op,
        back_flops,
        np.where(runs, total(sheet.backward + earlier * sheet.accumulated) + inside[:, 1], 0.0),
        np.where(runs, total(sheet.apart[1] + earlier * sheet.apart[2]), 0.0),
        np.where(runs, facts.backward_kernels[op], 0.0),
        backward_s,
    )
    return forward, backward


def adding_s(spec: DeviceSpec, sheet: OpSheet, kept: Kept, sizes: Sizes, count: int) -> Array:
    """Seconds in which backward of one of `count` microbatches adds gradients to those that are there, in passes of
    their own, which no measurement of an op on its own contains.
    """
    row_bytes = sizes.num_bytes[sheet.rows.tensor] / kept.parts
    weights = sheet.joined + (1.0 - 1.0 / count) * (sheet.accumulated + sheet.apart[2])
    added = np.add.reduceat(row_bytes * weights, sheet.row_starts)[kept.choices]
    seconds: Array = np.where(sheet.facts.has_backward[kept.owner], added, 0.0) / memory_rate(spec)
    return seconds


def _compute_s(
    spec: DeviceSpec, sheet: OpSheet, kept: Kept, flops: tuple[Array, Array], row_bytes: Array
) -> tuple[Array, Array]:
    """Seconds of arithmetic of forward and backward at the highest clock."""
    forward, backward = np.zeros((2, len(kept.owner)))
    is_matrix = np.zeros(len(sheet.facts.is_view), dtype=np.bool_)
    if spec.multiprocessors:
        is_matrix[sheet.facts.matrices] = True
    for (kind, dtype), ops in sheet.facts.kinds.items():
        here = positions(kept, ops[~is_matrix[ops]])
        forward[here] = compute_s(spec, kind, dtype, flops[0][here])
        backward[here] = compute_s(spec, kind, dtype, flops[1][here] / backward_share(spec, kind))
        matrices = ops[is_matrix[ops]]
        if len(matrices):
            here = positions(kept, matrices)
            forward[here], backward[here] = _gemms_s(spec, dtype, sheet, kept, here=here, figures=(flops, row_bytes))
    return forward, backward


def _gemms_s(
    spec: DeviceSpec, dtype: str, sheet: OpSheet, kept: Kept, *, here: Codes, figures: tuple[tuple[Array, Array], Array]
) -> tuple[Array, Array]:
    """Of GEMMs, and of the one or two of their backward.

    Local sizes follow from those of the three operands: with f = batch M N K, M = f / (batch K N) and so on, and
    batch = (batch M K) (batch K N) (batch M N) / f^2.
    """
    facts, (flops, row_bytes) = sheet.facts, figures
    number = np.empty(len(facts.is_view), dtype=np.int64)
    number[facts.matrices] = np.arange(len(facts.matrices))
    op = number[kept.owner[here]]
    rows = sheet.row_starts[kept.choices[here]][:, None] + facts.matrix_slots[op]
    a, b, c = (row_bytes[rows] / facts.matrix_items[op]).T
    products = flops[0][here] / 2.0
    m, n, k, batch = products / b, products / a, products / c, a * b * c / products**2
    times = gemm_s(spec, dtype, np.concatenate([(m, n, k, batch), (m, k, n, batch), (k, n, m, batch)], axis=1))
    own, by_a, by_b = times.reshape(3, -1)
    wanted = facts.matrix_wanted[:, op] * (flops[1][here] > 0) / backward_share(spec, "gemm")
    return own, by_a * wanted[0] + by_b * wanted[1]


def positions(kept: Kept, ops: Codes) -> Codes:
    """Of the kept choices of some ops, op after op."""
    if not len(ops):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(kept.starts[i], kept.starts[i + 1]) for i in ops])


def kernels(specs: tuple[DeviceSpec, ...], sheet: OpSheet, kept: Kept, work: Work) -> tuple[Array, Array]:
    """Seconds and dynamic joules at the highest clock that keeps the power limit; `specs` by falling clock."""
    time_s, energy_j = np.zeros(len(work.owner)), np.zeros(len(work.owner))
    limit_w = dynamic_limit_w(specs[0])
    for (kind, dtype), ops in sheet.facts.kinds.items():
        here = positions(kept, ops)
        here = here[work.is_done[here]]
        for spec in specs:
            time_s[here], energy_j[here] = _at(spec, kind, dtype, work, here)
            here = here[energy_j[here] > time_s[here] * limit_w]
            if not len(here):
                break
    return within_limit_s(specs[0], time_s, energy_j), energy_j


def clocked(
    specs: tuple[DeviceSpec, ...], limited: tuple[Array, Array], sheet: OpSheet, kept: Kept, work: Work
) -> tuple[Array, Array]:
    """As `kernels`, [clock, choice], at each clock; `limited` is what the power limit makes of clocks above it."""
    time_s, energy_j = np.zeros((2, len(specs), len(work.owner)))
    for (kind, dtype), ops in sheet.facts.kinds.items():
        here = positions(kept, ops)
        here = here[work.is_done[here]]
        for clock, spec in enumerate(specs):
            time_s[clock, here], energy_j[clock, here] = _at(spec, kind, dtype, work, here)
    above = energy_j > time_s * dynamic_limit_w(specs[0])
    return np.where(above, limited[0], time_s), np.where(above, limited[1], energy_j)


def _at(spec: DeviceSpec, kind: str, dtype: str, work: Work, here: Codes) -> tuple[Array, Array]:
    """Seconds and dynamic joules of some choices at the clock of `spec`."""
    num_bytes, apart_bytes = work.num_bytes[here], work.apart_bytes[here]
    time_s = kernel_time_s(
        spec, kind, computing_s=work.compute_s[here], num_bytes=num_bytes, num_kernels=work.kernels[here]
    )
    energy_j = kernel_energy_j(spec, kind, dtype, work.flops[here], num_bytes + apart_bytes)
    return time_s + apart_bytes / memory_rate(spec), energy_j


def launches_s(dispatch_s: float, sheet: OpSheet, kept: Kept, work: Work, time_s: Array) -> Array:
    """Seconds of launching that show, of each choice, beside kernels of `time_s`; see the module docstring."""
    if not dispatch_s:
        return np.zeros_like(time_s)
    first = kept.starts[:-1]
    block = sheet.facts.block + 1
    device = np.bincount(block, np.minimum.reduceat(time_s, first))
    launching = np.bincount(block, work.kernels[first] * dispatch_s)
    shows = np.maximum(0.0, 1.0 - np.divide(device, launching, out=np.ones_like(device), where=launching > 0))
    found: Array = shows[block][kept.owner] * work.kernels * dispatch_s
    return found
