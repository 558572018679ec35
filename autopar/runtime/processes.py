"""Joining and leaving `torch.distributed`, as a local worker or under torchrun."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from autopar.errors import WorkerError

JOIN_TIMEOUT_S = 120.0
"""How long a rank waits for the others to start."""
COLLECTIVE_TIMEOUT = timedelta(minutes=15)
"""How long a collective may take before it counts as hung."""


def is_torchrun() -> bool:
    """Whether a launcher has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def join_torchrun() -> None:
    """Join the processes that torchrun started, if not done yet."""
    if not dist.is_initialized():
        _prepare_device()
        dist.init_process_group(_backend(), timeout=COLLECTIVE_TIMEOUT)


def join_local(rank: int, world_size: int, directory: Path) -> None:
    """Join the processes of a local launch over the loopback interface.

    Rank 0 listens on a port that the system chooses and writes it to `directory/port`.

    Raises:
        WorkerError: if rank 0 does not come up.
    """
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        partial = directory / "port.partial"
        partial.write_text(str(store.port))
        partial.replace(directory / "port")
    else:
        store = dist.TCPStore("127.0.0.1", _port(directory), world_size, is_master=False)  # type: ignore[attr-defined]
    _prepare_device()
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


def _port(directory: Path) -> int:
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while not (directory / "port").exists():
        if time.monotonic() > deadline:
            raise WorkerError(f"rank 0 did not start within {JOIN_TIMEOUT_S:g} s")
        time.sleep(0.01)
    return int((directory / "port").read_text())


def leave() -> None:
    """Leave the group after everybody has arrived here."""
    if dist.is_initialized():
        dist.barrier()
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
