"""Cluster: identical devices in identical nodes, with every number that prices depend on and its source."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cached_property

from autopar.cost.device import DeviceSpec, Number, read_device
from autopar.errors import InputError
from autopar.ir.mesh import Group
from autopar.ir.profile import DeviceProfile, MeasuredLine
from autopar.resources import data_directory

NO_DEVICES = ("schema", "software")
"""Files in `costmodels/` that describe no device."""
CLOCKS_ABOVE_RIDGE = 24
"""Clocks from the ridge to the highest, where time and energy trade; evenly spaced."""
CLOCKS_BELOW_RIDGE = (0.85, 0.7, 0.55)
"""Shares of the ridge: slower and hardly thriftier, for power caps."""
LIMIT_STEP_HZ = 15e6
"""Spacing of the clocks to which a power limit lowers boards whose clocks cannot be locked; those of most others."""
LEAST_SHARE = 0.25
"""Of the highest clock: a power limit lowers clocks no further; what is left is waited for."""


@dataclass(frozen=True)
class Cluster:
    """Implements `ir.cost.Device`.

    Attributes:
        spec: the device.
        num_gpus: ceiling on the number of devices, >= 1.
        gpus_per_node: devices that share the fast link.
        memory_bytes: usable by a job on one device: capacity less reserve, or what the user said.
        free_clocks: whether plans may lock clocks; else devices are left alone.
        lines: transfers and updates that were measured on these devices; they replace what is modelled.
        network_bytes_per_s: line rate of all ports of a node, per direction; None: what the device file says.
    """

    spec: DeviceSpec
    num_gpus: int
    gpus_per_node: int
    memory_bytes: int
    free_clocks: bool = True
    lines: tuple[MeasuredLine, ...] = ()
    network_bytes_per_s: float | None = None

    @property
    def gpu(self) -> str:
        return self.spec.name

    @property
    def blocked_w(self) -> float:
        return self.spec.blocked_w

    @property
    def host_w_per_node(self) -> float:
        return self.spec.host_w_per_node

    @property
    def provenance(self) -> tuple[Number, ...]:
        """Every number of the device file with its source."""
        return self.spec.numbers

    @cached_property
    def input_hash(self) -> str:
        """SHA-256 over all numbers."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def clocks_hz(self) -> tuple[float, ...]:
        """Clocks worth planning with, highest first; only the highest where clocks cannot be locked."""
        control, highest = self.spec.clock_control, self.spec.clock_max_hz
        if control is None or not control.step_hz or not self.free_clocks:
            return (highest,)
        below = [share * control.ridge_share for share in CLOCKS_BELOW_RIDGE]
        usable = {hz for hz in self._steps_hz(below) if self.spec.clock_min_hz <= hz < highest}
        return (highest, *sorted(usable, reverse=True))

    def _steps_hz(self, below: Sequence[float]) -> list[float]:
        """Clocks of the board, from the highest that large kernels hold to the ridge, and `below` it."""
        control, highest, top = self.spec.clock_control, self.spec.clock_max_hz, self.spec.sustained_share
        if control is None:
            return []
        above = [top - (top - control.ridge_share) * k / CLOCKS_ABOVE_RIDGE for k in range(CLOCKS_ABOVE_RIDGE + 1)]
        step_hz = control.step_hz or LIMIT_STEP_HZ
        return [round(share * highest / step_hz) * step_hz for share in (*above, *below)]

    def slower_specs(self) -> tuple[DeviceSpec, ...]:
        """The device at every clock below its own, highest first."""
        highest = self.spec.clock_max_hz
        shares = [hz / highest for hz in self.clocks_hz if hz < self.spec.clock_share * highest]
        return tuple(replace(self.spec, clock_share=share) for share in shares)

    def limiting_specs(self) -> tuple[DeviceSpec, ...]:
        """The device at every clock to which its power limit may lower it, highest first: plans' clocks and others."""
        control, highest = self.spec.clock_control, self.spec.clock_max_hz
        if control is None:
            return ()
        step, ridge = 2 * (control.step_hz or LIMIT_STEP_HZ) / highest, control.ridge_share
        below = [ridge - step * k for k in range(1, math.ceil((ridge - LEAST_SHARE) / step))]
        shares = {hz / highest for hz in (*self._steps_hz(below), *self.clocks_hz)}
        slower = [share for share in shares if LEAST_SHARE <= share < self.spec.clock_share]
        return tuple(replace(self.spec, clock_share=share) for share in sorted(slower, reverse=True))

    def line(self, kind: str, ranks: int) -> MeasuredLine | None:
        """What was measured of a transfer or update, if anything."""
        return next((line for line in self.lines if line.kind == kind and line.ranks == ranks), None)

    def nodes(self, num_devices: int) -> int:
        """Nodes that a job on so many devices occupies."""
        return -(-num_devices // self.gpus_per_node)

    def members_in_node(self, group: Group) -> int:
        """Members of a collective group that share a node; divides the group's size."""
        members = group.members_per_node(self.gpus_per_node)
        while group.size % members:
            members -= 1
        return members

    @property
    def network_share_bytes_per_s(self) -> float:
        """Share of one device in its node's network ports, all devices sending at once."""
        link = self.spec.inter_node
        of_node = link.bandwidth_bytes_per_s if self.network_bytes_per_s is None else self.network_bytes_per_s
        return of_node * link.efficiency / self.gpus_per_node


def load_cluster(
    gpu: str,
    num_gpus: int,
    gpus_per_node: int | None = None,
    memory_bytes: int | None = None,
    network_bytes_per_s: float | None = None,
) -> Cluster:
    """A cluster of built-in devices.

    Args:
        gpu: kebab-case name of a file in `costmodels/`.
        num_gpus: >= 1.
        gpus_per_node: >= 1; the device's usual server if None.
        memory_bytes: memory that the job may use on one device, > 0; capacity less reserve if None.
        network_bytes_per_s: of all network ports of a node, per direction, > 0; the device file's if None.

    Raises:
        InputError: for an unknown GPU or a number out of range.
    """
    path = data_directory("costmodels") / f"{gpu}.json"
    names = _names()
    if gpu not in names:
        low = gpu.casefold()
        close = [name for name in names if low and name.startswith(low)] or get_close_matches(low, names, n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise InputError(f"unknown GPU {gpu!r}{hint} (all: 'autopar gpus')")
    spec = read_device(path)
    per_node = spec.gpus_per_node if gpus_per_node is None else gpus_per_node
    memory = spec.capacity_bytes - spec.reserve_bytes if memory_bytes is None else memory_bytes
    limits: Mapping[str, int] = {"number of GPUs": num_gpus, "GPUs per node": per_node, "memory in bytes": memory}
    for what, number in limits.items():
        if number < 1:
            raise InputError(f"{what} must be at least 1, found {number}")
    if network_bytes_per_s is not None and not 0 < network_bytes_per_s < math.inf:
        raise InputError(f"the network of a node must carry more than 0 bytes per second, found {network_bytes_per_s}")
    return Cluster(spec, num_gpus, per_node, memory, network_bytes_per_s=network_bytes_per_s)


def with_measured(cluster: Cluster, found: DeviceProfile | None) -> Cluster:
    """The cluster with what was measured on its device in place of the device file's numbers."""
    if found is None:
        return cluster
    spec = read_device(data_directory("costmodels") / f"{cluster.gpu}.json", found.numbers)
    return replace(cluster, spec=spec, lines=found.lines)


def with_power_limit(cluster: Cluster, limit_w: float) -> Cluster:
    """The cluster with a lower power limit set on every device.

    Raises:
        InputError: the limit is not above what a waiting device draws, or above the board's own.
    """
    spec = cluster.spec
    if not spec.blocked_w < limit_w <= spec.limit_w:
        raise InputError(
            f"the power limit of {spec.name} lies above the {spec.blocked_w:g} W that it draws while it waits, and "
            f"is at most {spec.limit_w:g} W, found {limit_w:g} W"
        )
    return replace(cluster, spec=replace(spec, power_limit_w=limit_w))


def list_gpus() -> tuple[DeviceSpec, ...]:
    """All built-in devices by name."""
    directory = data_directory("costmodels")
    return tuple(read_device(directory / f"{name}.json") for name in _names())


def _names() -> tuple[str, ...]:
    files = data_directory("costmodels").glob("*.json")
    return tuple(sorted(path.stem for path in files if path.stem not in NO_DEVICES))
