"""Joining and leaving `torch.distributed`: as a worker of a launch on one host or several, or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from autopar import torch_adapter
from autopar.ir.hosts import DEFAULT_TIMEOUT_S
from autopar.runtime.ending import Termination, quiet_when_told, tell, was_told
from autopar.runtime.failures import EndedError, is_cut, is_network_failure, missing_ranks, waiting_message
from autopar.runtime.hosts import Meeting, external_meeting
from autopar.runtime.liveness import Liveness, announce
from autopar.runtime.rendezvous import Peer, call_roll, choose_interface, open_external_store, open_store
from autopar.torch_adapter import Store


@dataclass(frozen=True)
class Membership:
    """This rank's place in the run.

    Attributes:
        store: where ranks meet.
        peers: of every rank.
        liveness: of every rank; None where there is one only.
        interface: over which gloo speaks; "" where the system chose.
    """

    rank: int
    meeting: Meeting
    store: Store
    peers: Mapping[int, Peer]
    liveness: Liveness | None
    interface: str

    @property
    def place(self) -> str:
        """For people: which host this is, where it meets the others, and over which interface."""
        meeting, own = self.meeting, self.peers[self.rank]
        over = f" over {self.interface}" if self.interface else ""
        return f"node {own.node} of {meeting.num_nodes} ({own.address}) meets the others at {meeting.where}{over}"

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Within the context, a failure is told to the other ranks, and one of the network becomes one message.

        Raises:
            NetworkError: other ranks did not answer.
        """
        with Termination() as termination:
            try:
                yield
            except (Exception, EndedError) as error:
                termination.ignore()
                self._tell(error)
                raise

    def _tell(self, error: BaseException) -> None:
        """Raise NetworkError if it was other ranks."""
        is_ended = isinstance(error, EndedError)
        is_network = is_ended or is_network_failure(error)
        reason = "" if is_network else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.liveness is None:
            return
        sight = self.liveness.sight(reason, is_cut=is_ended or is_cut(error))
        missing = missing_ranks(error, sight, self.rank, self.peers)
        if not is_network:
            return
        node = self.peers[self.rank].node
        if is_ended and not missing and not was_told(self.store, node):
            return
        message = waiting_message(error, sight, rank=self.rank, meeting=self.meeting, peers=self.peers)
        store = self.store if sight.store_silent_s is None else None
        rank = missing[0] if len(missing) == 1 else None
        raise tell(message, rank, store, node) from error


def join_torchrun(timeout_s: float = DEFAULT_TIMEOUT_S) -> Membership | None:
    """Join the processes that torchrun, or another launcher with its variables, started; None if done before.

    Raises:
        NetworkError: some rank does not come.
    """
    if dist.is_initialized():
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = external_meeting(os.environ, timeout_s)
    quiet_when_told()
    return _join(open_external_store(meeting, rank, os.environ), meeting, rank, world_size)


def join(meeting: Meeting, rank: int, world_size: int, listener: int | None = None) -> Membership:
    """Join the processes of a launch; rank 0 has inherited the descriptor of the listening socket.

    Raises:
        NetworkError: some rank does not come.
        InputError: the hosts were given different jobs.
    """
    return _join(open_store(meeting, rank, listener), meeting, rank, world_size)


def _join(store: Store, meeting: Meeting, rank: int, world_size: int) -> Membership:
    interface = choose_interface(meeting)
    announce(store, rank)
    peers = call_roll(store, meeting, rank, world_size)
    liveness = Liveness(store, rank, world_size) if world_size > 1 else None
    membership = Membership(rank, meeting, store, peers, liveness, interface)
    with membership.telling():
        limit = timedelta(seconds=meeting.limit_s)
        torch_adapter.limit_collectives(limit)
        store.set_timeout(limit)
        _prepare_device()
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size, timeout=limit)
    return membership


def leave(membership: Membership) -> None:
    """Leave the group after everybody has arrived here."""
    if dist.is_initialized():
        dist.barrier()
        if membership.liveness is not None:
            membership.liveness.stop()
        dist.destroy_process_group()


def device_type() -> str:
    """`cuda` where every local rank has a GPU of its own, else `cpu`."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks else "cpu"


def device_name() -> str:
    """`cpu`, or `cuda:<local rank>`."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device_type() == "cuda" else "cpu"


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if device_type() == "cuda" else "gloo"


def _prepare_device() -> None:
    if device_type() == "cuda":
        torch.cuda.set_device(device_name())
