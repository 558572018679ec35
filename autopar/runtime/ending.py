"""The end of a process that torchrun, or another launcher, started: what it knows of a failure is told once per host.

Such a launcher ends the other processes as soon as one has failed, while they may just be finding out what happened. It
restarts all of them where it may (`--max-restarts`), and prints what they record for it where it may not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from autopar.errors import NetworkError
from autopar.runtime.failures import EndedError, raise_ended
from autopar.torch_adapter import Store


def is_torchrun() -> bool:
    """Whether a launcher has given this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


class Termination:
    """SIGTERM of a launcher while this rank works: raises `EndedError`, then is what the process makes of it else."""

    def __init__(self) -> None:
        self._usual: Any = None

    def __enter__(self) -> Termination:
        """Catch it, where a launcher may send it and this thread would hear of it."""
        if is_torchrun() and threading.current_thread() is threading.main_thread():
            self._usual = signal.getsignal(signal.SIGTERM)
        if self._usual is not None:
            signal.signal(signal.SIGTERM, raise_ended)
        return self

    def ignore(self) -> None:
        """Until the context ends: this rank fails already, and has a message to finish."""
        if self._usual is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._usual is None:
            return
        signal.signal(signal.SIGTERM, self._usual)
        if isinstance(error, EndedError):
            signal.raise_signal(signal.SIGTERM)


def tell(message: str, rank: int | None, store: Store | None, node: int) -> NetworkError:
    """The error to raise; under a launcher its message has been printed by the first process of the host that got here.

    Args:
        message: for people.
        rank: that is missing.
        store: of the run, where it still answers.
        node: of this process.
    """
    error = NetworkError(message, rank=rank)
    if not is_torchrun():
        return error
    error.is_told = True
    if _is_first(store, node):
        print(f"autopar: {message}", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        ErrorHandler().record_exception(error)
    return error


def _is_first(store: Store | None, node: int) -> bool:
    try:
        return store is None or int(store.add(_told_key(node), 1)) == 1
    except dist.DistError:
        return True


def was_told(store: Store, node: int) -> bool:
    """Whether a process of the host has told of a failure."""
    try:
        return bool(store.check([_told_key(node)]))
    except dist.DistError:
        return False


def _told_key(node: int) -> str:
    return f"told/{node}"


def quiet_when_told() -> None:
    """A script that ends by an error of the network, which has been told, prints no traceback on each rank."""
    sys.excepthook = _quiet(sys.excepthook)


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _quiet(usual: Hook) -> Hook:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (isinstance(error, NetworkError) and error.is_told):
            usual(kind, error, trace)

    return hook
