"""Request: what the user asks for, and the cluster that it means."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from autopar.cost.hardware import Cluster, load_cluster, with_measured, with_power_limit
from autopar.cost.mixed import MixedCluster, describe_cluster
from autopar.cost.software import load_software
from autopar.errors import InputError
from autopar.ir.cluster import ClusterDescription
from autopar.ir.software import Software
from autopar.ir.solution import Limits, Objective, Pins
from autopar.planner.detect import GpuChoice, choose_gpu
from autopar.planner.objective import Economy
from autopar.planner.profile import NO_PROFILE, LoadedProfile, load_rows

Progress: TypeAlias = Callable[[str], None]
"""Told in one short phrase what is being done."""
OWN_SOFTWARE = "autopar"
"""The stack that `autopar run` is."""
CLOCKS = ("auto", "max")
LEAST_LIMIT = "power.limit_min_w"
"""Number of a device file: the lowest power limit that the driver sets."""
INTERRUPTED = "the search was interrupted: this is the best plan that it had found"
"""Note of a plan that another run with equal inputs need not give."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for, apart from the model.

    Attributes:
        num_gpus: ceiling on the number of GPUs, >= 1; with `cluster`: all of its GPUs.
        cluster: groups of several types of GPU, in place of `gpu`, `gpus_per_node` and `memory_bytes`.
        gpu: name in costmodels/, or None: what this machine has.
        gpus_per_node, memory_bytes, network_bytes_per_s: override the device file; the last is of a node's ports.
        batch_size: samples in the global batch; None: that of the example batch.
        profile: file of measured rows; None: the default store if there is one; `none`: no rows.
        with_baselines: search the baselines too.
        use_all: use exactly `num_gpus`.
        time_limit_s: of the search.
        clocks: `auto`: plans may lock clocks; `max`: devices are left alone.
        gpu_power_limit_w: power limit that is set on every GPU; None: the board's own.
        gap_tolerance: relative distance to the bound at which the search may stop.
        software: how the program would run; the default is autopar's own runtime. Others are for prices; what they say
            of overlap holds for `run` and `verify` too.
    """

    num_gpus: int
    gpu: str | None = None
    gpus_per_node: int | None = None
    memory_bytes: int | None = None
    objective: Objective = field(default_factory=lambda: Objective("time"))
    limits: Limits = field(default_factory=Limits)
    pins: Pins = field(default_factory=Pins)
    profile: str | None = None
    batch_size: int | None = None
    use_all: bool = False
    time_limit_s: float | None = None
    gap_tolerance: float = 1e-3
    with_baselines: bool = True
    clocks: str = "auto"
    cluster: ClusterDescription | None = None
    software: Software = field(default_factory=lambda: load_software(OWN_SOFTWARE))
    network_bytes_per_s: float | None = None
    gpu_power_limit_w: float | None = None
    economy: Economy | None = None

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise InputError(f"the number of GPUs must be at least 1, got {self.num_gpus}")
        if self.clocks not in CLOCKS:
            raise InputError(f"unknown clocks {self.clocks!r}; one of {', '.join(CLOCKS)}")
        if self.cluster is not None:
            self._check_cluster(self.cluster)
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {self.batch_size}")

    def _check_cluster(self, cluster: ClusterDescription) -> None:
        given = (self.gpu, self.gpus_per_node, self.memory_bytes, self.network_bytes_per_s, self.gpu_power_limit_w)
        if any(setting is not None for setting in given):
            raise InputError(
                "a cluster says which GPUs there are: leave out name, GPUs per node, memory, network and power limit"
            )
        if self.num_gpus != cluster.num_gpus:
            raise InputError(f"the cluster has {cluster.num_gpus} GPUs, not {self.num_gpus}")


@dataclass(frozen=True)
class Target:
    """The cluster that a request means, with what was measured on it."""

    choice: GpuChoice
    cluster: Cluster | MixedCluster
    profile: LoadedProfile

    @property
    def input_hash(self) -> str:
        """SHA-256 of every number that shapes the prices."""
        if not self.profile.digest:
            return self.cluster.input_hash
        return hashlib.sha256((self.cluster.input_hash + self.profile.digest).encode()).hexdigest()


def choose_target(request: PlanRequest) -> Target:
    """Resolve the GPU and load its numbers. Raises InputError for a GPU that has no cost model."""
    if request.cluster is not None:
        return _described_target(request, describe_cluster(request.cluster))
    choice = choose_gpu(request.gpu)
    cluster = load_cluster(
        choice.name,
        request.num_gpus,
        gpus_per_node=request.gpus_per_node,
        memory_bytes=request.memory_bytes,
        network_bytes_per_s=request.network_bytes_per_s,
    )
    cluster = replace(cluster, free_clocks=request.clocks == "auto")
    profile = load_rows(request.profile, choice.name)
    cluster = with_measured(cluster, profile.device)
    if request.gpu_power_limit_w is not None:
        cluster = with_power_limit(cluster, request.gpu_power_limit_w)
        _check_settable(cluster, request.gpu_power_limit_w)
    return Target(choice, cluster, profile)


def _check_settable(cluster: Cluster, limit_w: float) -> None:
    """Raises InputError for a limit below what the board takes, where the device file knows it."""
    least = next((number for number in cluster.provenance if number.path == LEAST_LIMIT), None)
    if least is not None and limit_w < least.value:
        raise InputError(
            f"{cluster.gpu} takes power limits from {least.value:g} W ({least.source}), found {limit_w:g} W"
        )


def _described_target(request: PlanRequest, cluster: Cluster | MixedCluster) -> Target:
    choice = GpuChoice(cluster.gpu, "flag", 0, "")
    if isinstance(cluster, Cluster):
        cluster = replace(cluster, free_clocks=request.clocks == "auto")
        profile = load_rows(request.profile, cluster.gpu)
        return Target(choice, with_measured(cluster, profile.device), profile)
    if request.profile not in (None, NO_PROFILE):
        raise InputError("measured rows (--profile) are for clusters of one type of GPU")
    note = "several types of GPU: every price is modelled, and all GPUs are left at their highest clock"
    return Target(choice, cluster, LoadedProfile(None, "", note))


def say_nothing(_phrase: str) -> None:
    """Progress that nobody follows."""
