"""How hosts meet: what a rank must know to join the others, and the one socket at which they do. Needs no torch.

The launcher of node 0 binds the listening socket to the meeting address alone, and hands it to rank 0.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopar.errors import InputError
from autopar.ir.hosts import DEFAULT_PORT, JOIN_S, Hosts, meeting_place

REPORT_S = 3.0
"""What a rank needs from the end of its wait to the message."""


@dataclass(frozen=True)
class Meeting:
    """What a rank must know to join the others; JSON between launcher and worker.

    Attributes:
        num_nodes, node_rank, address, port, timeout_s, join_timeout_s: as in `Hosts`; the port is never 0 here.
        fingerprint: of the job; equal on all hosts.
    """

    num_nodes: int
    node_rank: int
    address: str
    port: int
    timeout_s: float
    join_timeout_s: float
    fingerprint: str

    @property
    def limit_s(self) -> float:
        """Of a collective: less than `timeout_s` by what the message needs."""
        return self.timeout_s - min(REPORT_S, self.timeout_s / 2)

    @property
    def where(self) -> str:
        """`address:port`."""
        return meeting_place(self.address, self.port)


def make_meeting(hosts: Hosts, port: int, job: Mapping[str, Any]) -> Meeting:
    """The meeting of a job (JSON) at a port that is bound by now. Raises InputError as `resolve` does."""
    text = json.dumps([hosts.num_nodes, job], sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Meeting(hosts.num_nodes, hosts.node_rank, resolve(hosts), port, hosts.timeout_s, hosts.waits_s, fingerprint)


def external_meeting(variables: Mapping[str, str], timeout_s: float) -> Meeting:
    """The meeting that torchrun's environment variables describe, or those of another launcher that sets them.

    Raises:
        InputError: they are incomplete, or no numbers.
    """
    try:
        world_size = int(variables["WORLD_SIZE"])
        per_node = int(variables.get("LOCAL_WORLD_SIZE", world_size))
        node_rank = int(variables.get("GROUP_RANK", int(variables["RANK"]) // per_node))
        port = int(variables.get("MASTER_PORT", DEFAULT_PORT))
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"the launcher's variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: {error}") from None
    hosts = Hosts(max(1, world_size // per_node), node_rank, variables["MASTER_ADDR"], port, timeout_s)
    return Meeting(hosts.num_nodes, node_rank, hosts.address, port, timeout_s, JOIN_S, "")


NAME_S = 60.0
"""How long a name of another host may take to appear, as those of new pods do."""


def resolve(hosts: Hosts | Meeting) -> str:
    """The meeting address as a number.

    Raises:
        InputError: nobody knows the name, or it leads other hosts back to themselves.
    """
    deadline = time.monotonic() + (NAME_S if hosts.num_nodes > 1 else 0.0)
    while True:
        try:
            found = str(socket.getaddrinfo(hosts.address, None, type=socket.SOCK_STREAM)[0][4][0])
            break
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise InputError(f"master address {hosts.address}: {error.strerror}") from None
            time.sleep(1.0)
    if hosts.num_nodes > 1 and ipaddress.ip_address(found.partition("%")[0]).is_loopback:
        raise InputError(
            f"master address {hosts.address} means {found} here, which other hosts do not reach: give host 0's number"
        )
    return found


def listen(hosts: Hosts | Meeting) -> socket.socket:
    """A listening socket at the meeting address and nowhere else; for node 0.

    Raises:
        InputError: the address is not one of this host, cannot be found, or its port is taken.
    """
    address = resolve(hosts)
    family, kind, protocol, _, target = socket.getaddrinfo(address, hosts.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"master address {hosts.address} is not an address of this host, which is node 0"
            ) from None
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"{hosts.where} is taken by another process: give another --master-port on every host"
            ) from None
        raise InputError(f"cannot listen at {hosts.where}: {error.strerror}") from None
    return listener
