"""Training under a policy: steps in blocks that end together, timed, with energy where the node has a meter.

Every process calls `train` with equal options. Of the policies with a server, rank 0 is the server and computes
nothing. All samples of a step are those of all workers together, so every policy does equal work per step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import InputError
from autopar.ir.quantity import Quantity
from autopar.ir.sync import SyncPolicy, SyncRun
from autopar.runtime.measure import energy_of_step, node_meter, readings_of
from autopar.runtime.sync.hooks import POWER_SGD_START, averaging
from autopar.runtime.sync.replica import Descent, Replica, Task
from autopar.runtime.sync.server import ServedWorker, Server

MakeTask = Callable[[int, int], Task]
"""Makes the task of one worker: its index among so many."""
WARM_UP = POWER_SGD_START
"""Steps before the timed ones: the first are slower, and PowerSGD begins after them."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: timed ones, >= 1.
        blocks: into which they are divided; the time of a step is the median over blocks.
        rate, momentum: of SGD.
    """

    steps: int = 20
    blocks: int = 5
    rate: float = 0.1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.blocks < 1:
            raise InputError(f"steps and blocks must be at least 1, got {self.steps} and {self.blocks}")


@dataclass(frozen=True)
class Trained:
    """The run, equal on all ranks, and the parameters that this rank ended with, as one vector."""

    run: SyncRun
    values: Tensor


def train(make_task: MakeTask, policy: SyncPolicy, options: TrainOptions) -> Trained:
    """Train on all processes. Raises InputError where a server has no worker."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    rank, size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    num_workers = size - policy.has_server
    if num_workers < 1:
        raise InputError(f"{policy} needs a server and a worker: at least 2 processes")
    own = _make_rank(make_task, policy, options, rank, num_workers, is_alone=alone)
    own.run(0, WARM_UP)
    own.forget()
    _meet(alone)
    seconds = []
    with node_meter("cpu") as meter:
        if meter is not None:
            meter.start()
        for start, stop in _blocks(WARM_UP, options):
            began = time.perf_counter()
            own.run(start, stop)
            _meet(alone)
            seconds.append((time.perf_counter() - began) / (stop - start))
        reading = meter.stop() if meter is not None else None
    own.finish()
    energy, note = energy_of_step(readings_of(reading), options.steps)
    step_time = Quantity(statistics.median(seconds), "s", "measured", min(seconds), max(seconds))
    losses, staleness = _gather(own, alone)
    run = SyncRun(policy, num_workers, step_time, energy, losses, staleness, (note,) if note else ())
    return Trained(run, own.values)


def _blocks(first: int, options: TrainOptions) -> list[tuple[int, int]]:
    """Spans of steps, as equal as may be, none empty."""
    count = min(options.blocks, options.steps)
    edges = [first + options.steps * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _meet(alone: bool) -> None:
    if not alone:
        dist.barrier()


class _Rank(ABC):
    """What one rank does: `run` steps; `losses` of them (empty on a server); how stale gradients were."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.losses: list[float] = []
        self.staleness: Counter[int] = Counter()

    @abstractmethod
    def run(self, start: int, stop: int) -> None:
        """Steps `start` to `stop`, the latter not included."""

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Leave `values` as the result of the run; every rank calls it, after the last step."""

    def forget(self) -> None:
        """Staleness counts from here on."""
        self.staleness.clear()


class _Averaging(_Rank):
    """All-reduce of gradients, every step."""

    def __init__(self, replica: Replica, policy: SyncPolicy, options: TrainOptions, *, is_alone: bool) -> None:
        super().__init__(replica.values)
        self.replica, self.num_workers = replica, 1 if is_alone else dist.get_world_size()
        self.descent = Descent(options.rate, options.momentum)
        self._hook: tuple[Any, Any] | None = None if is_alone else averaging(policy)

    def run(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.losses.append(self.replica.compute(step))
            gradient = self.replica.gradient
            if self._hook is not None:
                state, hook = self._hook
                found = hook(state, self.replica.bucket).wait()
                if found.data_ptr() != gradient.data_ptr():
                    gradient.copy_(found)
            self.descent.apply(self.values, gradient)
            self.staleness[0] += self.num_workers


class _Local(_Rank):
    """SGD of one's own; the mean of the parameters every H steps, and in the end."""

    def __init__(self, replica: Replica, policy: SyncPolicy, options: TrainOptions, *, is_alone: bool) -> None:
        super().__init__(replica.values)
        self.replica, self.num_workers = replica, 1 if is_alone else dist.get_world_size()
        self.every, self.is_alone = policy.local_steps, is_alone
        self.descent = Descent(options.rate, options.momentum)
        self._since = 0

    def run(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.losses.append(self.replica.compute(step))
            self.descent.apply(self.values, self.replica.gradient)
            self.staleness[0] += self.num_workers
            self._since += 1
            if self._since == self.every:
                self.finish()

    def finish(self) -> None:
        if self._since and not self.is_alone:
            dist.all_reduce(self.values.div_(self.num_workers))
        self._since = 0


class _Serving(_Rank):
    """Rank 0 of a policy with a server."""

    def __init__(self, server: Server, *, is_synchronous: bool) -> None:
        super().__init__(server.values)
        self.server, self.is_synchronous = server, is_synchronous
        self.staleness = server.staleness

    def run(self, start: int, stop: int) -> None:
        if self.is_synchronous:
            for _ in range(start, stop):
                self.server.serve_step()
        else:
            self.server.serve_pushes((stop - start) * self.server.num_workers)


class _Served(_Rank):
    """A worker of a server."""

    def __init__(self, worker: ServedWorker) -> None:
        super().__init__(worker.replica.values)
        self.worker = worker

    def run(self, start: int, stop: int) -> None:
        self.losses += [self.worker.step(step) for step in range(start, stop)]


def _make_rank(
    make_task: MakeTask, policy: SyncPolicy, options: TrainOptions, rank: int, num_workers: int, *, is_alone: bool
) -> _Rank:
    """The rank's part; all begin with the parameters of rank 0."""
    index = max(0, rank - policy.has_server)
    replica = Replica(make_task(index, num_workers))
    if not is_alone:
        dist.broadcast(replica.values, 0)
    if policy.has_server and rank == 0:
        server = Server(policy, replica.values, Descent(options.rate, options.momentum))
        return _Serving(server, is_synchronous=policy.kind == "ps-sync")
    if policy.has_server:
        return _Served(ServedWorker(policy, replica))
    kind = _Local if policy.kind == "local" else _Averaging
    return kind(replica, policy, options, is_alone=is_alone)


def _gather(own: _Rank, alone: bool) -> tuple[tuple[float, ...], dict[int, int]]:
    """Mean losses of every step, and staleness, over all ranks (of one kind's counts: the server's, or rank 0's)."""
    everywhere: list[tuple[Sequence[float], dict[int, int]]] = [(own.losses, dict(own.staleness))]
    if not alone:
        everywhere = [([], {})] * dist.get_world_size()
        dist.all_gather_object(everywhere, (own.losses, dict(own.staleness)))
    columns = [losses for losses, _ in everywhere if losses]
    means = tuple(float(torch.tensor(step, dtype=torch.float64).mean()) for step in zip(*columns, strict=True))
    return means, dict(sorted(everywhere[0][1].items()))
