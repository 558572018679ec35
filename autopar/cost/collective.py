"""Time and energy of collectives: latency and seconds per byte over two link levels.

A group of n ranks has n1 members in each of n2 = n / n1 nodes. NCCL runs a ring through all of them, so every rank
passes the same bytes on, and the slowest link on the way sets the pace. With B bytes (`all_reduce`: the local value;
`all_gather`: the result; `reduce_scatter`: the operand) and p = 2 passes for all_reduce, 1 for the others:

| group           | seconds per byte                                                            |
|-----------------|-----------------------------------------------------------------------------|
| in one node     | (p (n-1) + f) / (n b(n)), f: steps that filling the ring takes             |
| across nodes    | p (n-1) / (n min(b(n1), n1 s))                                              |
| in-switch       | (n+1) / (n r): all_reduce in one node whose switch adds (NVLink SHARP)      |
| `all_to_all`    | (n1-1) / (n b') + (n-n1) / (n s), of the local value                        |

b(n) is what a GPU's links give the group: all of its bandwidth under a switch, as many rings as the members' links
hold elsewhere (`topology`), less where groups cross between the halves of a PCIe node. s is a GPU's share of its
node's ports: all groups of an axis run at once, so n1 < gpus_per_node members have n1 shares. In-switch reduction is
taken where it is faster: every GPU sends its value once and multicasts 1/n of the sum. NCCL could use trees for large
sums over two nodes; measured training with such groups (VIA-Research/vTrain) shows the ring's time.

The fixed part is a line over the members of a node (2 steps per member in all_reduce), and between nodes

- all_reduce: `latency_s` + `latency_per_hop_s` for each level of a tree over the nodes (NCCL's choice for small sizes);
- the others: `latency_s` + half of a hop for every further node and of an inner hop for every further GPU (rings).

Each cost is linear in B, so a redistribution is a pair of numbers whatever the tensor. Source of the bytes: Thakur,
Rabenseifner, Gropp 2005; of the parameters: `benchmarks/fit_collectives.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.cost.hardware import Cluster
from autopar.cost.topology import pair_share, ring_share, send_share
from autopar.ir.mesh import Group

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True, slots=True)
class LinearCost:
    """`latency_s + bytes * s_per_byte` seconds and `bytes * j_per_byte` joules (per device)."""

    latency_s: float = 0.0
    s_per_byte: float = 0.0
    j_per_byte: float = 0.0

    def time_s(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes * self.s_per_byte


def collective_cost(cluster: Cluster, kind: str, group: Group) -> LinearCost:
    """Cost of one collective in a group; a group of one is free.

    Raises:
        ValueError: for a kind that is not in COLLECTIVES.
    """
    if kind not in COLLECTIVES:
        raise ValueError(f"unknown collective {kind!r}")
    if group.size == 1:
        return LinearCost()
    measured = cluster.line(kind, group.size)
    if measured is not None and cluster.members_in_node(group) == group.size:
        j_per_byte = cluster.spec.intra_node.j_per_byte
        return LinearCost(measured.latency_s, measured.s_per_byte, j_per_byte)
    inside = cluster.members_in_node(group)
    fast_share, slow_share = _shares(kind, inside, group.size)
    if kind == "all_to_all":
        s_per_byte = slow_share / cluster.network_share_bytes_per_s
        if inside > 1:
            s_per_byte += fast_share / _inner_bytes_per_s(cluster, kind, group, inside)
    else:
        s_per_byte = _ring_s_per_byte(cluster, kind, group, inside)
    fast, slow = cluster.spec.intra_node, cluster.spec.inter_node
    return LinearCost(
        _latency_s(cluster, kind, inside, group.size // inside),
        s_per_byte,
        fast_share * fast.j_per_byte + slow_share * slow.j_per_byte,
    )


def _passes(kind: str) -> int:
    return 2 if kind == "all_reduce" else 1


def _ring_s_per_byte(cluster: Cluster, kind: str, group: Group, inside: int) -> float:
    passes, fast = _passes(kind), cluster.spec.intra_node
    sent = passes * (group.size - 1) / group.size
    if inside == 1:
        return sent / cluster.network_share_bytes_per_s
    inner = _inner_bytes_per_s(cluster, kind, group, inside)
    if inside < group.size:
        return sent / min(inner, inside * cluster.network_share_bytes_per_s)
    ring = (sent + fast.ring_fill / group.size) / inner
    if kind != "all_reduce" or not fast.reduction_bytes_per_s:
        return ring
    return min(ring, (group.size + 1) / group.size / fast.reduction_bytes_per_s)


def _inner_bytes_per_s(cluster: Cluster, kind: str, group: Group, inside: int) -> float:
    """What one GPU can send to the members of its node, all groups at once."""
    fast, per_node = cluster.spec.intra_node, cluster.gpus_per_node
    share = pair_share if kind == "all_to_all" else ring_share
    bandwidth = fast.bandwidth_bytes_per_s * share(cluster.spec.topology, inside, group.stride, per_node)
    if 2 * inside * group.stride > per_node > 2:
        # Groups lie across both halves of the node: each of the interleaved ones has its part of what joins them.
        crossing = inside * inside / 4 / (inside - 1) if kind == "all_to_all" else 1.0
        bandwidth = min(bandwidth, fast.bridge_bytes_per_s / (group.stride * max(1.0, crossing)))
    return bandwidth


def _latency_s(cluster: Cluster, kind: str, inside: int, nodes: int) -> float:
    fast, slow = cluster.spec.intra_node, cluster.spec.inter_node
    steps = 0.5 * _passes(kind)
    found = 0.0
    if inside > 1:
        found += fast.latency_s + steps * fast.latency_per_hop_s * (inside - 1)
    if nodes == 1:
        return found
    if kind == "all_reduce":
        return found + slow.latency_s + slow.latency_per_hop_s * math.ceil(math.log2(nodes))
    hops = slow.latency_per_hop_s + (inside - 1) * fast.latency_per_hop_s
    return found + slow.latency_s + steps * hops * (nodes - 1)


def _shares(kind: str, inside: int, size: int) -> tuple[float, float]:
    """Bytes that one rank sends per byte of B, over the fast and over the slow link (mean of the ranks)."""
    if kind == "all_to_all":
        return (inside - 1) / size, (size - inside) / size
    sent = _passes(kind) * (size - 1) / size
    leaving = sent / inside if inside < size else 0.0
    return sent - leaving, leaving


def send_cost(cluster: Cluster, same_node: bool) -> LinearCost:
    """Cost of one rank sending to one other, all ranks of the stage at once."""
    link = cluster.spec.intra_node if same_node else cluster.spec.inter_node
    measured = cluster.line("send", 2)
    if measured is not None and same_node:
        return LinearCost(measured.latency_s, measured.s_per_byte, link.j_per_byte)
    bandwidth = cluster.network_share_bytes_per_s
    if same_node:
        bandwidth = link.bandwidth_bytes_per_s * send_share(cluster.spec.topology, cluster.gpus_per_node)
    return LinearCost(link.p2p_latency_s, 1 / bandwidth, link.j_per_byte)
