"""LeanStage: a pipeline stage that has memory for what it receives only while it needs it.

The engine allocates a buffer for every microbatch's received values, and one for every gradient it will receive, before
the first step, and keeps them. Here a buffer is made when the receive is posted; the engine's own list lets it go once
the microbatch has run, so that it lives on as long as backward needs it and no longer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage


class LeanStage(PipelineStage):
    """See the module docstring. Where the engine looks for a buffer that is not needed, it finds one without memory."""

    _is_lean = False

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a microbatch's values."""
        self._begin()
        self._fill(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receives of a microbatch's gradients."""
        self._begin()
        if self.has_backward and not self.is_last:
            self._fill(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch forward; what it received lives on in what is kept for backward."""
        self._begin()
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

    def _begin(self) -> None:
        """Before the first microbatch: give back what the engine has allocated."""
        if self._is_lean:
            return
        for infos in (*self.args_recv_info.values(), *self.grad_recv_info.values()):
            _empty(infos)
        self._is_lean = True

    def _fill(self, infos: Any) -> None:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and buffer.is_meta:
                made = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=self.device)
                info.buffer = made.requires_grad_(buffer.requires_grad)


def _empty(infos: Any) -> None:
    """Replace each buffer by one of its shape without memory."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None and not buffer.is_meta:
            bare = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="meta")
            info.buffer = bare.requires_grad_(buffer.requires_grad)
