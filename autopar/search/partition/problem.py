"""The partition problem as stated and the independent evaluation of an answer.

Every node runs on one device; nodes of one colour run on the same device. Along the forward edges the nodes of a device
are contiguous: devices can be ordered so that no forward edge between (merged) colour classes points back. Backward
nodes follow the forward nodes of their colour. The load of an accelerator is its compute time plus, for every producer
with an edge that crosses its border, that producer's transfer time, once. A CPU pays no transfers and has no memory
limit. Loads in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from autopar.errors import InputError


@dataclass(frozen=True)
class PartitionNode:
    """One op. `accelerator_s` None: it runs on CPUs only. `colour` None: a colour of its own."""

    accelerator_s: float | None
    cpu_s: float
    size_bytes: float = 0.0
    is_backward: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class PartitionEdge:
    """`source` and `target` index the nodes; `transfer_s` is the time to move the source's output, on every edge."""

    source: int
    target: int
    transfer_s: float


@dataclass(frozen=True)
class PartitionProblem:
    """A graph without cycles and the devices that share it.

    Raises:
        InputError: for edges that name no node, costs that are negative or not finite, two transfer times of one
            producer, an edge from a backward to a forward node, or no device at all.
    """

    nodes: tuple[PartitionNode, ...]
    edges: tuple[PartitionEdge, ...]
    num_accelerators: int
    num_cpus: int = 0
    memory_bytes: float = math.inf

    def __post_init__(self) -> None:
        if not self.nodes or self.num_accelerators < 0 or self.num_cpus < 0 or math.isnan(self.memory_bytes):
            raise InputError("a partition needs nodes, device numbers of at least 0 and a memory limit")
        for node in self.nodes:
            costs = (node.accelerator_s or 0.0, node.cpu_s, node.size_bytes)
            if not all(math.isfinite(c) and c >= 0 for c in costs):
                raise InputError(f"times and sizes are finite and at least 0: {node}")
        for edge in self.edges:
            if not (0 <= edge.source < len(self.nodes) and 0 <= edge.target < len(self.nodes)):
                raise InputError(f"{edge} joins nodes outside 0..{len(self.nodes) - 1}")
            if not (math.isfinite(edge.transfer_s) and edge.transfer_s >= 0):
                raise InputError(f"a transfer time is finite and at least 0: {edge}")
            if self.nodes[edge.source].is_backward and not self.nodes[edge.target].is_backward:
                raise InputError(f"{edge} leads from a backward to a forward node")
        self.transfers_s()

    def transfers_s(self) -> dict[int, float]:
        """Producer -> transfer time; InputError if its edges disagree."""
        times: dict[int, float] = {}
        for edge in self.edges:
            known = times.setdefault(edge.source, edge.transfer_s)
            if not math.isclose(known, edge.transfer_s, rel_tol=1e-9, abs_tol=1e-12):
                raise InputError(f"node {edge.source} has edges with different transfer times")
        return times


@dataclass(frozen=True)
class Share:
    """What one device got: `nodes` in ascending order, its load in seconds."""

    is_cpu: bool
    nodes: tuple[int, ...]
    load_s: float


@dataclass(frozen=True)
class PartitionResult:
    """`bound_s` <= optimum <= `load_s`; `shares` in an order in which no forward edge points back.

    `status`: optimal (the exact program or CP-SAT proved it), feasible, infeasible (proven), no-solution.
    `method`: dynamic-program or cp-sat. `num_ideals`: down-sets of the contracted graph, None if too many to list.
    """

    status: str
    shares: tuple[Share, ...]
    load_s: float
    bound_s: float
    method: str
    num_ideals: int | None

    @property
    def gap(self) -> float:
        """(load - bound) / load."""
        if not self.shares:
            return math.inf
        return max(0.0, self.load_s - self.bound_s) / self.load_s if self.load_s > 0 else 0.0


def share_of(problem: PartitionProblem, is_cpu: bool, nodes: frozenset[int]) -> Share:
    """The share with its load, counted from the definition; infinite if the device cannot hold or run it."""
    ordered = tuple(sorted(nodes))
    if is_cpu:
        return Share(True, ordered, math.fsum(problem.nodes[v].cpu_s for v in ordered))
    times = [problem.nodes[v].accelerator_s for v in ordered]
    if any(t is None for t in times) or math.fsum(problem.nodes[v].size_bytes for v in ordered) > problem.memory_bytes:
        return Share(False, ordered, math.inf)
    transfers_s = problem.transfers_s()
    crossing = sorted({e.source for e in problem.edges if (e.source in nodes) != (e.target in nodes)})
    return Share(False, ordered, math.fsum(t or 0.0 for t in times) + math.fsum(transfers_s[u] for u in crossing))


def evaluate(problem: PartitionProblem, parts: list[tuple[bool, frozenset[int]]]) -> tuple[Share, ...]:
    """The shares of (is CPU, nodes) pairs, empty ones left out.

    Raises:
        InputError: unless every node stands in exactly one part, colours stay together and devices suffice.
    """
    parts = [part for part in parts if part[1]]
    device = {v: index for index, (_, nodes) in enumerate(parts) for v in nodes}
    if len(device) != len(problem.nodes) or sum(len(nodes) for _, nodes in parts) != len(device):
        raise InputError("a partition holds every node exactly once")
    cpus = sum(is_cpu for is_cpu, _ in parts)
    if cpus > problem.num_cpus or len(parts) - cpus > problem.num_accelerators:
        raise InputError("the partition uses more devices than there are")
    colours: dict[int, set[int]] = defaultdict(set)
    for v, node in enumerate(problem.nodes):
        if node.colour is not None:
            colours[node.colour].add(device[v])
    if any(len(found) > 1 for found in colours.values()):
        raise InputError("a colour is spread over several devices")
    return tuple(share_of(problem, is_cpu, nodes) for is_cpu, nodes in parts)
