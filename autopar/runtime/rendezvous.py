"""How ranks find each other: one store at the meeting address, a roll call, the interface to speak over.

The store listens at the meeting address only (torch's own would listen on every interface). Each rank writes who and
where it is, and waits until all have. A store that a rank's predecessor has already joined belongs to a run that is
ending: the rank leaves it and comes again.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from autopar.errors import InputError, NetworkError
from autopar.runtime.hosts import Meeting, listen
from autopar.torch_adapter import PrefixStore, Store, TCPStore

RETRY_S = 0.5
GET_INTERFACE_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""


@dataclass(frozen=True)
class Peer:
    """Where a rank is.

    Attributes:
        node: its host's number.
        host: the host's name.
        address: of its interface, for people; "" where unknown.
        fingerprint: of the job that it was given.
    """

    node: int
    host: str
    address: str
    fingerprint: str


def open_store(meeting: Meeting, rank: int, listener: int | None = None) -> TCPStore:
    """The store of this run.

    Args:
        meeting: of the run.
        rank: of this process.
        listener: descriptor of a listening socket at the meeting address, which rank 0 must have.

    Raises:
        NetworkError: it does not come up in time.
    """
    deadline = time.monotonic() + meeting.join_timeout_s
    while True:
        store = _connect(meeting, rank, listener, timedelta(seconds=max(1.0, deadline - time.monotonic())))
        if rank == 0 or store.add(f"joined/{rank}", 1) == 1:
            return store
        del store  # of a run that is ending
        if time.monotonic() > deadline:
            raise NetworkError(_nobody_at(meeting, rank))
        time.sleep(RETRY_S)


def open_external_store(meeting: Meeting, rank: int, variables: Mapping[str, str]) -> Store:
    """The store of a run that torchrun started, whose agent has one (and chose what it listens on), or a new one.

    Raises:
        NetworkError: it does not come up in time.
        InputError: rank 0 cannot listen at the address.
    """
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _connect(meeting, -1, None, timedelta(seconds=meeting.join_timeout_s))
        return PrefixStore(f"autopar/{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return open_store(meeting, rank, listen(meeting).detach() if rank == 0 else None)


def _connect(meeting: Meeting, rank: int, listener: int | None, timeout: timedelta) -> TCPStore:
    if rank == 0:
        return TCPStore(
            meeting.address,
            meeting.port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    try:
        return TCPStore(meeting.address, meeting.port, timeout=timeout, wait_for_workers=False)
    except dist.DistError:
        raise NetworkError(_nobody_at(meeting, rank)) from None


def _nobody_at(meeting: Meeting, rank: int) -> str:
    return (
        f"rank {rank} found no run to join at {meeting.where} within {meeting.join_timeout_s:g} s: "
        "is node 0 started, is this the address of its host, and is the port open between the hosts?"
    )


def call_roll(store: Store, meeting: Meeting, rank: int, world_size: int) -> Mapping[int, Peer]:
    """Every rank's place, once all are there.

    Raises:
        NetworkError: some rank does not come.
        InputError: ranks were given different jobs.
    """
    address = meeting.address if meeting.node_rank == 0 else local_address(meeting)
    own = Peer(meeting.node_rank, socket.gethostname(), address, meeting.fingerprint)
    store.set(_key(rank), json.dumps(asdict(own)))
    keys = [_key(other) for other in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=meeting.join_timeout_s))
        found = store.multi_get(keys)
    except dist.DistError:
        raise NetworkError(_absent(store, meeting, rank, world_size)) from None
    peers = {other: Peer(**json.loads(text)) for other, text in enumerate(found)}
    odd = sorted({peer.node for peer in peers.values() if peer.fingerprint != peers[0].fingerprint})
    if odd:
        raise InputError(
            f"node {odd[0]} runs another plan, or other options, than node 0: give every host the same plan file and "
            "the same options"
        )
    return peers


def _key(rank: int) -> str:
    return f"peer/{rank}"


def _absent(store: Store, meeting: Meeting, rank: int, world_size: int) -> str:
    """Who did not come; the store may be gone too."""
    try:
        absent = [other for other in range(world_size) if not store.check([_key(other)])]
    except dist.DistError:
        return _nobody_at(meeting, rank)
    per_node = world_size // meeting.num_nodes
    nodes = sorted({other // per_node for other in absent})
    return (
        f"rank {rank} waited {meeting.join_timeout_s:g} s at {meeting.where} for rank {_listed(absent)} on node "
        f"{_listed(nodes)}: start them with the same options but their own --node-rank, or see why they do not get here"
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def local_address(meeting: Meeting) -> str:
    """This host's address on the way to the meeting; "" if there is no way. Nothing is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(meeting.address, meeting.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_of(address: str) -> str:
    """Name of the interface that has the address; "" where that cannot be told (only Linux says)."""
    if not address or sys.platform != "linux":
        return ""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((row[5] for row in rows if row[0] == wanted), "")
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        return next((name for _, name in socket.if_nameindex() if _has_address(query, name, address)), "")


def _has_address(query: socket.socket, name: str, address: str) -> bool:
    request = struct.pack("256s", name.encode()[:15])
    try:
        answer = fcntl.ioctl(query.fileno(), GET_INTERFACE_ADDRESS, request)
    except OSError:  # an interface without an address
        return False
    return socket.inet_ntoa(answer[20:24]) == address


def choose_interface(meeting: Meeting) -> str:
    """Make gloo and NCCL speak over the interface that leads to the meeting, unless the user chose; its name."""
    name = interface_of(local_address(meeting))
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if name != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return os.environ.get("GLOO_SOCKET_IFNAME", "")
