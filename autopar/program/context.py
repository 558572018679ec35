"""Causal attention whose rows are split over ranks while every rank has all keys and values.

Rank r of n has run r of the rows. Later rows see more keys, so that the last rank would do (2n - 1) / n^2 of the work.
Instead the ranks r and n - 1 - r trade the second halves of their runs before, and the results after: rank r does the
halves 2r and 2 (n - 1 - r) + 1 of 2n, which together see 2n halves of keys, whatever r is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from autopar.program.collectives import AxisGroup


def causal_attention(  # noqa: PLR0917 - the order of ATen
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    row_axes: tuple[AxisGroup, ...],
) -> Tensor:
    """Attention of this rank's rows, q[B H L/n E], over k[B H L E] and v[B H L F]; the outermost axis cuts first."""
    rows = query.shape[-2]
    run, size = 0, 1
    for axis in row_axes:
        run, size = run * axis.size + axis.index, size * axis.size
    assert rows * size == key.shape[-2], "rows are not split evenly"
    kept = rows - rows // 2
    first, second = query[..., :kept, :], query[..., kept:, :]

    def attend(part: Tensor, last: int) -> Tensor:
        return _lower_right(part, key[..., :last, :], value[..., :last, :], scale, enable_gqa)

    result = attend(first, run * rows + kept)
    if rows == 1:
        return result
    mirrored = attend(_trade(second, row_axes), (size - run) * rows)
    return torch.cat([result, _trade(mirrored, row_axes)], -2)


def _lower_right(query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool) -> Tensor:
    """The last row of q sees the last key. Fused kernels know this alignment, so that no mask is made for them."""
    bias = None if query.shape[-2] == key.shape[-2] else causal_lower_right(query.shape[-2], key.shape[-2])
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, bias, is_causal=bias is None, scale=scale, enable_gqa=enable_gqa
    )


def _trade(x: Tensor, axes: tuple[AxisGroup, ...]) -> Tensor:
    """The tensor of the rank at the mirrored position; mirroring on every axis is mirroring the run."""
    for axis in axes:
        if axis.size > 1:
            moved: Tensor = _Mirror.apply(x, axis)  # type: ignore[no-untyped-call]
            x = moved
    return x


class _Mirror(torch.autograd.Function):
    """Swap with the mirrored rank; its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: AxisGroup) -> Tensor:
        ctx.axis = axis
        return _swap(x, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _swap(gradients[0], ctx.axis), None


def _swap(x: Tensor, axis: AxisGroup) -> Tensor:
    mirror = axis.size - 1 - axis.index
    if mirror == axis.index:
        return x.clone()
    sent = x.contiguous()
    received = torch.empty_like(sent)
    work = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=axis.process_group, group_peer=mirror),
            dist.P2POp(dist.irecv, received, group=axis.process_group, group_peer=mirror),
        ]
    )
    for each in work:
        each.wait()
    return received
