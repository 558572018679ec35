"""Mixed clusters: prices of stages on several types of GPU.

Every type is a `Cluster` of its own, whose nodes count as large as its smallest one. Neighbouring stages of different
types send over the slower of the two inter-node links, unless the description says otherwise; joules are those of the
dearer one. All types run at their highest clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from autopar.cost.collective import LinearCost, send_cost
from autopar.cost.hardware import Cluster, load_cluster
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.cluster import ClusterDescription
from autopar.ir.cost import Link
from autopar.ir.graph import OpGraph
from autopar.ir.mixed import MixedDevice, MixedSource
from autopar.ir.software import Software
from autopar.ir.solution import Pins


@dataclass(frozen=True)
class MixedCluster(MixedDevice):
    """Implements `ir.cost.Device` as the envelope of its types."""

    parts: tuple[Cluster, ...]
    description: ClusterDescription

    @property
    def gpu(self) -> str:
        return " + ".join(part.gpu for part in self.parts)

    @cached_property
    def input_hash(self) -> str:
        """SHA-256 over all numbers."""
        hashes = [part.input_hash for part in self.parts]
        text = json.dumps([hashes, asdict(self.description)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def part(self, gpu: str) -> Cluster:
        """The type of that name. Raises KeyError."""
        return {part.gpu: part for part in self.parts}[gpu]

    @cached_property
    def links(self) -> Mapping[tuple[int, int], Link]:
        """(type, other type): the link between neighbouring stages."""
        every = range(len(self.parts))
        return {(a, b): self._link(self.parts[a], self.parts[b]) for a in every for b in every if a != b}

    def _link(self, one: Cluster, other: Cluster) -> Link:
        sends = [send_cost(cluster, same_node=False) for cluster in (one, other)]
        latency_s, s_per_byte = max(s.latency_s for s in sends), max(s.s_per_byte for s in sends)
        own = self.description.link
        if own is not None and own.latency_s is not None:
            latency_s = own.latency_s
        if own is not None and own.bandwidth_bytes_per_s is not None:
            s_per_byte = max(one.gpus_per_node, other.gpus_per_node) / own.bandwidth_bytes_per_s
        return Link(latency_s, s_per_byte, max(s.j_per_byte for s in sends))


@dataclass(frozen=True)
class MixedTables(MixedSource):
    """`MixedSource` of priced tables."""

    parts: tuple[CostTables, ...]

    def part(self, gpu: str) -> CostTables | None:
        """The tables of the type of that name."""
        return dict(zip(self.names, self.parts, strict=True)).get(gpu)

    def send(self, gpu: str, other: str) -> LinearCost:
        """Between neighbouring stages of two types."""
        link = self.links[self.names.index(gpu), self.names.index(other)]
        return LinearCost(link.latency_s, link.s_per_byte, link.j_per_byte)


def describe_cluster(description: ClusterDescription) -> Cluster | MixedCluster:
    """The cluster of a description; a plain one where there is one type.

    Raises:
        InputError: an unknown GPU, one type in two groups, or a number out of range.
    """
    names = [group.gpu for group in description.groups]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"groups: {name} stands in {names.count(name)} groups; give all its nodes as a list in one"
            )
    parts = tuple(
        load_cluster(group.gpu, sum(group.nodes), min(group.nodes), group.memory_bytes) for group in description.groups
    )
    return parts[0] if len(parts) == 1 else MixedCluster(parts, description)


def mixed_tables(graph: OpGraph, cluster: MixedCluster, pins: Pins, software: Software | None = None) -> MixedTables:
    """Tables of every type, priced by the model alone."""
    parts = tuple(CostTables(graph, part, pins=pins, software=software) for part in cluster.parts)
    return MixedTables(tuple(part.gpu for part in cluster.parts), parts, cluster.links)
