"""Time and energy of collectives: alpha-beta over two link levels.

A group of n ranks has n1 members in each of n2 = n / n1 nodes. Collectives are hierarchical: inside the node over the
fast link of bandwidth b1, between nodes each rank works on 1/n1 of the data over its share b2 of the node's ports
(all groups of an axis run at once, so the share is that of a busy node). With B bytes:

| collective       | B is             | seconds per byte                                               |
|------------------|------------------|----------------------------------------------------------------|
| `all_reduce`     | the local value  | 2 (n1-1) / (n1 b1) + 2 (n2-1) / (n2 n1 b2)                     |
| `all_gather`     | the result       | (n1-1) / (n1 b1) + (n2-1) / (n2 n1 b2)                         |
| `reduce_scatter` | the operand      | the same                                                       |
| `all_to_all`     | the local value  | (n1-1) / (n b1) + (n-n1) / (n b2)                              |

Latency of a level is a + h (m-1) for its m members; collectives with half of all_reduce's steps pay half of h.
Source: Thakur, Rabenseifner, Gropp 2005 (ring algorithms); hierarchical composition as NCCL does it. Each cost is
linear in B, so a redistribution is a pair of numbers whatever the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cost.hardware import Cluster
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
    inside = cluster.members_in_node(group)
    across = group.size // inside
    fast, slow = cluster.spec.intra_node, cluster.spec.inter_node
    hops = 1.0 if kind == "all_reduce" else 0.5
    fast_share, slow_share = _shares(kind, inside, across)
    latency_s = 0.0
    if inside > 1:
        latency_s += fast.latency_s + hops * fast.latency_per_hop_s * (inside - 1)
    if across > 1:
        latency_s += slow.latency_s + hops * slow.latency_per_hop_s * (across - 1)
    return LinearCost(
        latency_s,
        fast_share / fast.bandwidth_bytes_per_s + slow_share / cluster.network_share_bytes_per_s,
        fast_share * fast.j_per_byte + slow_share * slow.j_per_byte,
    )


def _shares(kind: str, inside: int, across: int) -> tuple[float, float]:
    """Bytes that one rank sends per byte of B, over the fast and over the slow link."""
    if kind == "all_to_all":
        size = inside * across
        return (inside - 1) / size, (size - inside) / size
    passes = 2 if kind == "all_reduce" else 1
    return passes * (inside - 1) / inside, passes * (across - 1) / (across * inside)


def send_cost(cluster: Cluster, same_node: bool) -> LinearCost:
    """Cost of one rank sending to one other, all ranks of the stage at once."""
    link = cluster.spec.intra_node if same_node else cluster.spec.inter_node
    bandwidth = link.bandwidth_bytes_per_s if same_node else cluster.network_share_bytes_per_s
    return LinearCost(link.p2p_latency_s, 1 / bandwidth, link.j_per_byte)
