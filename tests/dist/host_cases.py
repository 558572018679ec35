"""What ranks do in the tests of meetings and of failures."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist


def listening_addresses(arguments: dict[str, Any]) -> list[str]:
    """Addresses at which this rank listens."""
    from tests.dist.test_rendezvous import listening

    dist.all_reduce(torch.ones(1))
    return sorted(listening())


def wait_for_one(arguments: dict[str, Any]) -> None:
    """All ranks but one wait in `wait`; that one does `instead`."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    group = dist.new_group(list(range(last + 1)))
    dist.barrier()
    if rank == last:
        _instead(arguments["instead"])
        return
    x = torch.ones(4)
    if arguments["wait"] == "all_reduce":
        work = dist.all_reduce(x, group=group, async_op=True)
        work.wait()
    elif arguments["wait"] == "recv":
        dist.recv(x, src=last, group=group)
    else:
        dist.barrier(group=group)


def sum_for_ever(arguments: dict[str, Any]) -> None:
    """Sum over all ranks, again and again."""
    x = torch.ones(1)
    for step in itertools.count(1):
        dist.all_reduce(x)
        if dist.get_rank() == 0:
            print(f"step {step}/", flush=True)
        time.sleep(0.1)


def _instead(what: str) -> None:
    if what == "sleep":
        time.sleep(600)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
