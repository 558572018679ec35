"""LeanStage: a pipeline stage that has memory for what it receives only while it needs it.

The engine allocates a buffer for every microbatch's received values, and one for every gradient it will receive, before
the first step, and keeps them. Here a buffer is made when the receive is posted; the engine's own list lets it go once
the microbatch has run, so that it lives on as long as backward needs it and no longer.

ReshardingStage: a stage whose neighbours have other meshes. The engine knows one peer per neighbour, which sends or
takes all of a value; here the sends and receives at a cut are those of the value's pieces, and the engine runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from autopar.runtime.resharding import Arrival, Cut, Route


class LeanStage(PipelineStage):
    """See the module docstring. Where the engine looks for a buffer that is not needed, it finds one without memory."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a microbatch's values."""
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a microbatch's gradients."""
        if self.has_backward and not self.is_last:
            self._fill(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch forward; what it received lives on in what is kept for backward."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _empty(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch backward. The engine keeps the loss, and with it the values that were received."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if self.is_last:
            if isinstance(loss, torch.Tensor):
                loss.detach_()
        elif self.has_backward:
            _empty(self.grad_recv_info[bwd_chunk_id])

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """What the engine allocates before the first step, it allocates without memory. Shapes are known: it computes
        nothing then.
        """
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _fill(self, infos: Any) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and buffer.is_meta:
                made = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=self.device)
                info.buffer = made.requires_grad_(buffer.requires_grad)


class ReshardingStage(LeanStage):
    """See the module docstring. Its process group has this rank alone, so the engine itself speaks to nobody."""

    def __init__(self, *args: Any, before: Cut | None, after: Cut | None, **kwargs: Any) -> None:
        """As its base class.

        Args:
            before, after: the cuts on both sides; None at the ends of the pipeline.
        """
        super().__init__(*args, **kwargs)
        self._before, self._after = before, after
        self._values: dict[int, list[Arrival]] = {}
        self._gradients: dict[int, list[Arrival]] = {}

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of the pieces of a microbatch's values."""
        if self._before is None:
            return []
        return self._await(self._values, fwd_chunk_id, self.args_recv_info[fwd_chunk_id], self._before.values)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of the pieces of a microbatch's gradients."""
        if self._after is None or not self.has_backward:
            return []
        return self._await(self._gradients, bwd_chunk_id, self.grad_recv_info[bwd_chunk_id], self._after.gradients)

    def _await(
        self, arrivals: dict[int, list[Arrival]], chunk: int, infos: Any, routes: Sequence[Route | None]
    ) -> list[dist.P2POp]:
        """Buffers for what a microbatch receives, and the receives."""
        self._fill(infos)
        pairs = zip(infos, routes, strict=True)
        arrivals[chunk] = [route.incoming(info.buffer) for info, route in pairs if route is not None]
        return [operation for arrival in arrivals[chunk] for operation in arrival.operations]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends of the pieces of what a microbatch has made."""
        if self._after is None:
            return []
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        pairs = zip(outputs, self._after.values, strict=True)
        return [operation for output, route in pairs for operation in route.outgoing(output)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends of the pieces of the gradients of what a microbatch has received."""
        if self._before is None or not self.has_backward:
            return []
        found, gradients = [], self.bwd_cache.pop(bwd_chunk_id)
        for gradient, route, info in zip(gradients, self._before.gradients, self.args_recv_info[0], strict=True):
            if route is not None and gradient is not None:
                found += route.outgoing(gradient)
            elif route is not None and info.buffer is not None:
                found += route.outgoing(torch.zeros_like(info.buffer, device=self.device))
        return found

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch forward, on values put together from their pieces."""
        for arrival in self._values.pop(fwd_chunk_id, []):
            arrival.finish()
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch backward, on gradients put together from their pieces."""
        for arrival in self._gradients.pop(bwd_chunk_id, []):
            arrival.finish()
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """The engine's first exchange (torch 2.11): none."""
        return []

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """The engine's first exchange (torch 2.12 on): shapes are known on all stages."""
        return torch.ones(1, dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1, dtype=torch.int32)


def _empty(infos: Any) -> None:
    """Replace each buffer by one of its shape without memory."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None and not buffer.is_meta:
            bare = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="meta")
            info.buffer = bare.requires_grad_(buffer.requires_grad)
