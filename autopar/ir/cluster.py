"""Descriptions of clusters of several types of GPU: what a cluster file says and a plan remembers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """Nodes of one type of GPU.

    Attributes:
        gpu: name in `costmodels/`.
        nodes: GPUs of each node.
        memory_bytes: usable by a job on one GPU; None: capacity less reserve.
    """

    gpu: str
    nodes: tuple[int, ...]
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LinkDescription:
    """The link between nodes of different groups; None: the slower of what the groups have.

    Attributes:
        bandwidth_bytes_per_s: of a whole node, per direction.
        latency_s: fixed part of a send.
    """

    bandwidth_bytes_per_s: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class ClusterDescription:
    """Groups of different types, at least one."""

    groups: tuple[GroupDescription, ...]
    link: LinkDescription | None = None

    @property
    def num_gpus(self) -> int:
        return sum(sum(group.nodes) for group in self.groups)
