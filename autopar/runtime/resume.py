"""Taking up training where its newest checkpoint ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from autopar.errors import InputError
from autopar.runtime.checkpoint import load
from autopar.runtime.checkpoint_store import CheckpointStore, Position
from autopar.runtime.executor import Executor


def take_up(executor: Executor, store: CheckpointStore, start: Position) -> tuple[Position, tuple[str, ...]]:
    """Load, of the checkpoints that look whole, the newest whose bytes are; every rank must call.

    Args:
        executor: of this rank, as new.
        store: of the checkpoints.
        start: where training begins where there is none, at step 0.

    Returns:
        where it stands now, and what was said of checkpoints that were passed over.

    Raises:
        InputError: the checkpoints are of another model, batch or order of samples, or all are damaged.
    """
    directories, found_remarks = _of_first_rank(store.whole())
    remarks = list(found_remarks)
    say(*remarks)
    first_error: InputError | None = None
    for directory in directories:
        try:
            found = load(executor, Path(directory))
        except InputError as error:
            first_error = first_error or error
            remarks.append(f"passed over: {error}")
            say(remarks[-1])
            continue
        _check(directory, found, start)
        say(f"taken up at step {found.step} from {directory}, written by {found.num_gpus} processes")
        return replace(start, step=found.step), tuple(remarks)
    if first_error is not None:
        raise first_error
    return start, tuple(remarks)


def _check(directory: str, found: Position, start: Position) -> None:
    """What the order of samples and random streams depend on is as it was."""
    for name in ("batch_size", "data_seed", "seed") if found.step else ():
        ours, theirs = getattr(start, name), getattr(found, name)
        if ours != theirs:
            raise InputError(f"{directory}: was written with {name} {theirs}, and this run has {ours}")


def _of_first_rank(found: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the first rank found, on every rank: a checkpoint may vanish while others look."""
    if not dist.is_initialized():
        return found
    told = [found]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def is_first() -> bool:
    """Whether this rank speaks for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(*lines: str) -> None:
    """Print lines from the first rank."""
    for line in lines if is_first() else ():
        print(line, flush=True)
