"""Hosts: which hosts take part in a run, as one of them sees it.

Each host starts its own ranks: host k of K those from k * N / K on. All meet at one address, of host 0.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from autopar.errors import InputError

DEFAULT_TIMEOUT_S = 600.0
"""How long a collective may take before it counts as hung. NCCL's own default."""
SHORTEST_TIMEOUT_S = 2.0
"""Below this a slow start counts as a failure."""
LOCAL_JOIN_S = 120.0
"""How long ranks of one host wait for each other to start."""
JOIN_S = 600.0
"""How long a host waits for the others to start."""
DEFAULT_PORT = 29500
"""Of torchrun."""


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run, as one of them sees it.

    Attributes:
        num_nodes: hosts, each with as many ranks as the others.
        node_rank: of this one.
        address: at which all ranks meet; of node 0. A name or a number.
        port: of the meeting; 0: any free one, on a single host.
        timeout_s: of a collective.
        join_timeout_s: how long to wait for the other hosts; None: 10 min, or 2 min on a single host.
    """

    num_nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    timeout_s: float = DEFAULT_TIMEOUT_S
    join_timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises InputError."""
        if self.num_nodes < 1 or not 0 <= self.node_rank < self.num_nodes:
            raise InputError(
                f"--node-rank {self.node_rank} of --nodes {self.num_nodes}: hosts count from 0, up to one less"
            )
        if not (math.isfinite(self.timeout_s) and self.timeout_s >= SHORTEST_TIMEOUT_S):
            raise InputError(f"--timeout must be at least {SHORTEST_TIMEOUT_S:g} s, got {self.timeout_s:g}")
        if self.num_nodes > 1 and not 0 < self.port < 2**16:
            raise InputError(f"--master-port must be between 1 and 65535, got {self.port}")
        if self.num_nodes > 1 and _is_unspecified(self.address):
            raise InputError(f"--master-addr {self.address} is no single address: give the one that all hosts reach")

    @property
    def where(self) -> str:
        """`address:port` of the meeting."""
        return meeting_place(self.address, self.port)

    @property
    def waits_s(self) -> float:
        """How long to wait for the others."""
        return self.join_timeout_s or (JOIN_S if self.num_nodes > 1 else LOCAL_JOIN_S)

    def local_ranks(self, num_processes: int) -> range:
        """Ranks of this host. Raises InputError where hosts would differ in their number."""
        if num_processes % self.num_nodes:
            raise InputError(f"{num_processes} processes do not divide into {self.num_nodes} hosts of equal size")
        count = num_processes // self.num_nodes
        return range(self.node_rank * count, (self.node_rank + 1) * count)


def meeting_place(address: str, port: int) -> str:
    """`10.0.0.1:29500` or `[fd00::1]:29500`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_unspecified(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return address == ""
