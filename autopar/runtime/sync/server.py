"""The parameter server (rank 0) and its workers: gradients are pushed, parameters pulled, each as one message.

The synchronous server adds gradients in the order of ranks and updates by their mean. The asynchronous one updates at
each gradient, in the order of arrival, by 1/W of the rate, so that a gradient of each of W workers moves as far as one
synchronous step; it counts how many updates lie between a worker's pull and its push.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.sync import SyncPolicy, message_bytes
from autopar.runtime.sync.codec import Feedback, codec_of
from autopar.runtime.sync.replica import Descent, Replica

SERVER = 0


class Server:
    """Holds the parameters."""

    def __init__(self, policy: SyncPolicy, values: Tensor, descent: Descent) -> None:
        self.values = values
        self.descent = descent
        self.num_workers = dist.get_world_size() - 1
        self.codec = codec_of(policy)
        length = message_bytes(policy, values.numel(), values.element_size())
        self.message = torch.empty(length, dtype=torch.uint8)
        self.staleness: Counter[int] = Counter()
        self._version = 0
        self._pulled = [0] * (self.num_workers + 1)

    def serve_step(self) -> None:
        """One synchronous step."""
        total = torch.zeros_like(self.values)
        for worker in range(1, self.num_workers + 1):
            dist.recv(self.message, worker)
            total += self.codec.decode(self.message, self.values)
        self.descent.apply(self.values, total / self.num_workers)
        self.staleness[0] += self.num_workers
        for worker in range(1, self.num_workers + 1):
            dist.send(self.values, worker)

    def serve_pushes(self, count: int) -> None:
        """So many gradients, as they come."""
        for _ in range(count):
            worker = dist.recv(self.message)
            self.descent.apply(self.values, self.codec.decode(self.message, self.values), 1 / self.num_workers)
            self.staleness[self._version - self._pulled[worker]] += 1
            self._version += 1
            self._pulled[worker] = self._version
            dist.send(self.values, worker)


class ServedWorker:
    """A worker of either server: what it computes with is what it pulled last."""

    def __init__(self, policy: SyncPolicy, replica: Replica) -> None:
        self.replica = replica
        self._feedback = Feedback(codec_of(policy))
        self._is_coded = policy.compression != "none"

    def step(self, index: int) -> float:
        loss = self.replica.compute(index)
        if self._is_coded:
            message, _ = self._feedback.encode(self.replica.gradient)
        else:
            message = self._feedback.codec.encode(self.replica.gradient)
        dist.send(message, SERVER)
        dist.recv(self.replica.values, SERVER)
        return loss
