"""Means of gradients over workers, by hooks as torch's DistributedDataParallel has them: `hook(state, bucket)`.

`averaging` gives torch's own hook where torch has one (plain, bf16, PowerSGD) and ours for 8 bits and top-k. They run
on `FlatBucket`, the one bucket of all gradients, which has the methods of torch's bucket that hooks call.

- fp8: every worker sends each other its part of the vector, coded; each sums its part, codes the mean and gathers it
  to all. Both codings feed back what they lose.
- top-k: every worker gathers the coded vectors of all, and adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from autopar.ir.sync import SyncPolicy
from autopar.runtime.sync.codec import Feedback, codec_of

Hook: TypeAlias = Callable[[Any, Any], "torch.futures.Future[Tensor]"]
POWER_SGD_START = 2
"""Steps summed whole before PowerSGD begins: the fewest that torch allows."""


class FlatBucket:
    """All gradients as one vector: the methods of `torch.distributed.GradBucket` that hooks call."""

    def __init__(self, vector: Tensor, views: Sequence[Tensor]) -> None:
        """`views` are the gradients inside `vector`, by parameter."""
        self._vector = vector
        self._views = [view.reshape(1) if view.dim() == 0 else view for view in views]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self._vector

    def set_buffer(self, vector: Tensor) -> None:
        self._vector = vector

    def gradients(self) -> list[Tensor]:
        return self._views


class CodedState:
    """What our hooks keep between steps: the group, and feedback of both codings."""

    def __init__(self, policy: SyncPolicy, group: dist.ProcessGroup | None = None) -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.parts: list[Feedback] = [Feedback(codec_of(policy)) for _ in range(dist.get_world_size(self.group))]
        self.mean = Feedback(codec_of(policy))


def averaging(policy: SyncPolicy, group: dist.ProcessGroup | None = None) -> tuple[Any, Hook]:
    """State and hook that replace a bucket by its mean over the group (None: all processes)."""
    if policy.compression == "bf16":
        return group, default_hooks.bf16_compress_hook
    if policy.compression == "power-sgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=group, matrix_approximation_rank=policy.rank, start_powerSGD_iter=POWER_SGD_START
        )
        return state, powerSGD_hook.powerSGD_hook
    if policy.compression == "fp8":
        return CodedState(policy, group), fp8_hook
    if policy.compression == "top-k":
        return CodedState(policy, group), top_k_hook
    return group, default_hooks.allreduce_hook


def fp8_hook(state: CodedState, bucket: Any) -> torch.futures.Future[Tensor]:
    """See the module docstring. A vector that does not divide is filled up with zeros."""
    vector, size = bucket.buffer(), dist.get_world_size(state.group)
    if size == 1:
        return _done(vector)
    length = -(-vector.numel() // size)
    padded = torch.nn.functional.pad(vector, (0, length * size - vector.numel()))
    pairs = zip(state.parts, padded.chunk(size), strict=True)
    sent = torch.cat([feedback.encode(part)[0] for feedback, part in pairs])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=state.group)
    like = padded[:length]
    codec = state.mean.codec
    own = sum((codec.decode(message, like) for message in received.chunk(size)), torch.zeros_like(like)) / size
    message, _ = state.mean.encode(own)
    everything = torch.empty(size * message.numel(), dtype=torch.uint8, device=message.device)
    dist.all_gather_into_tensor(everything, message, group=state.group)
    decoded = torch.cat([codec.decode(part, like) for part in everything.chunk(size)])
    vector.copy_(decoded[: vector.numel()])
    return _done(vector)


def top_k_hook(state: CodedState, bucket: Any) -> torch.futures.Future[Tensor]:
    """See the module docstring."""
    vector, size = bucket.buffer(), dist.get_world_size(state.group)
    if size == 1:
        return _done(vector)
    message, _ = state.mean.encode(vector)
    everything = torch.empty(size * message.numel(), dtype=torch.uint8, device=message.device)
    dist.all_gather_into_tensor(everything, message, group=state.group)
    decoded = [state.mean.codec.decode(part, vector) for part in everything.chunk(size)]
    vector.copy_(torch.stack(decoded).mean(dim=0))
    return _done(vector)


def _done(vector: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(vector)
    return future
