"""What NCCL's watchdog writes to the log before it aborts a process whose collective does not end. Needs no torch."""

from __future__ import annotations

import re

WATCHDOG = re.compile(r"WorkNCCL\([^)]*OpType=(?P<name>\w+)[^\n]*?ran for (?P<waited_ms>\d+) milliseconds")
WORDS = {
    "ALLREDUCE": "all_reduce", "ALLGATHER": "all_gather", "_ALLGATHER_BASE": "all_gather", "ALLTOALL": "all_to_all",
    "ALLTOALL_BASE": "all_to_all", "_REDUCE_SCATTER_BASE": "reduce_scatter", "RECVANYSOURCE": "recv",
    "COALESCED": "batch_isend_irecv",
}  # fmt: skip
"""c10d's names of collectives -> those of `torch.distributed`, where lower case is not enough."""


def collective_word(name: str) -> str:
    """`all_reduce` for `ALLREDUCE`, as c10d and its logs spell it."""
    return WORDS.get(name, name.lower())


def nccl_message(log: str, rank: int) -> str | None:
    """The first collective that the log of a rank says did not end, as one message; None if it says nothing."""
    found = WATCHDOG.search(log)
    if found is None:
        return None
    name = collective_word(found["name"])
    return (
        f"rank {rank} waited {int(found['waited_ms']) / 1e3:.0f} s in {name} (NCCL): a rank of its group is gone, hung "
        "or cut off; look at what the other hosts printed, at the link between them, and at NCCL_SOCKET_IFNAME"
    )
