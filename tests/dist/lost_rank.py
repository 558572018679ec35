"""A script under torchrun whose rank 1 is killed while rank 0 waits for it."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from autopar.runtime.processes import join_torchrun


def main() -> None:
    membership = join_torchrun(8.0)
    assert membership is not None
    with membership.telling():
        dist.all_reduce(torch.ones(1))
        if membership.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
    sys.exit("the sum came to an end")


if __name__ == "__main__":
    main()
