"""Offload: what it costs to keep optimizer states and activations outside of a device, on the host or on disk.

A byte on its way to the host crosses the host link of its device; on its way to disk it crosses that link, and then
waits for the disks of the node, which all devices of the node share. States of the optimizer are brought in and out
once a step, shard by shard, and nothing runs beside that. Activations go out once a microbatch and come back once; to
the host beside computation on a stream of their own, at most `WINDOW_BYTES` at a time, to disk while computation waits.

The memory of a CPU device is that of its host: what is offloaded to the host moves, but leaves nothing free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cost.hardware import Cluster
from autopar.cost.pricing import NodePrice
from autopar.errors import InputError
from autopar.ir.cost import Array, Outside
from autopar.ir.offload import LEAST_BYTES, NOWHERE, SHARD_BYTES, WINDOW_BYTES, Offload

AT_WORK = 3
"""Of the largest that an op saves, as many are on the device at once for the op that runs and those around it, beside
what ops need without offload. Source: bytes that a multilayer perceptron takes on a CPU (tests/dist/test_memory.py)."""


@dataclass(frozen=True)
class OffloadPrice:
    """Of moving bytes of one device to one place.

    Attributes:
        s_per_byte, j_per_byte: one way.
        leaves: bytes that are moved are gone from the device's memory.
        hides: moves run beside computation.
        window_bytes: that are on the device meanwhile.
    """

    s_per_byte: float
    j_per_byte: float
    leaves: bool
    hides: bool
    window_bytes: float


def offload_price(cluster: Cluster, place: str) -> OffloadPrice | None:
    """The price of one of `ir.offload.PLACES`; None for NOWHERE.

    Raises:
        InputError: the device file does not say how fast the place can be reached.
    """
    if place == NOWHERE:
        return None
    link, disk = cluster.spec.host_link, cluster.spec.disk
    is_disk, is_cpu = place == "disk", cluster.spec.kind == "cpu"
    if link is None or (is_disk and disk is None):
        key = "disk" if link is not None else "host_link"
        raise InputError(f"offloading to {place}: costmodels/{cluster.gpu}.json lacks {key}.bandwidth_bytes_per_s")
    s_per_byte, j_per_byte = 1.0 / link.bytes_per_s, link.j_per_byte
    if is_disk and disk is not None:
        s_per_byte += min(cluster.gpus_per_node, cluster.num_gpus) / disk.bytes_per_s
        j_per_byte += disk.j_per_byte
    hides = not is_disk and not is_cpu
    return OffloadPrice(s_per_byte, j_per_byte, is_disk or not is_cpu, hides, WINDOW_BYTES if hides else 0.0)


@dataclass(frozen=True)
class OffloadPrices:
    """Of both kinds of state; None: it stays on the device."""

    optimizer: OffloadPrice | None = None
    activations: OffloadPrice | None = None


def offload_prices(cluster: Cluster, offload: Offload) -> OffloadPrices:
    """Raises InputError as `offload_price`."""
    return OffloadPrices(offload_price(cluster, offload.optimizer), offload_price(cluster, offload.activations))


def shard_bytes(own: Array, total: Array | float) -> Array:
    """States on the device during the update, where one parameter has `own` bytes of them, and all together `total`."""
    room: Array = np.maximum(own, np.minimum(total, SHARD_BYTES))
    return room


def outside(sizes: Array, forward_s: Array, backward_s: Array, price: OffloadPrice) -> Outside:
    """Activations of ops that are offloaded, by choice.

    Args:
        sizes: bytes that each keeps of one microbatch.
        forward_s, backward_s: of its computation.
    """
    moved = np.where(sizes >= LEAST_BYTES, sizes, 0.0)
    seconds = moved * price.s_per_byte
    shown = [np.maximum(0.0, seconds - own) if price.hides else seconds for own in (forward_s, backward_s)]
    return Outside(moved, seconds, *shown)


@dataclass(frozen=True)
class Leaving:
    """An op whose activations go elsewhere.

    Attributes:
        price: its own, to be changed.
        staying_bytes: of batch inputs that it keeps, which stay where they are.
        times: in how many blocks it stands.
    """

    price: NodePrice
    staying_bytes: float
    times: int


def offload_activations(ops: Sequence[Leaving], price: OffloadPrice) -> None:
    """Takes what ops keep from the device; some is on its way, or back, when they run."""
    total = floor = 0.0
    for op in ops:
        own = op.price
        leaving = np.maximum(0.0, own.activation_bytes - op.staying_bytes)
        own.outside = found = outside(leaving, own.forward_s, own.backward_s, price)
        own.forward_s += found.forward_s
        own.backward_s += found.backward_s
        own.microbatch_j += 2.0 * found.num_bytes * price.j_per_byte
        own.activation_bytes -= found.num_bytes if price.leaves else 0.0
        total += float(found.num_bytes.max()) * op.times
        floor = max(floor, float(found.num_bytes.min()))
    for op in ops:
        assert op.price.outside is not None
        at_work = AT_WORK * np.maximum(floor, op.price.outside.num_bytes)
        op.price.workspace_bytes += np.minimum(total, np.maximum(price.window_bytes, at_work))
