"""The `autopar.*` local operations of `rules.local`: ops whose sharded form is not the op itself.

Written in plain torch and the collectives of this package, so autograd differentiates them. Arguments are those of
the ATen op, then what `LocalCall` lists; mesh axes arrive as `AxisGroup`s, outermost first.

Shapes: N tokens or samples, C classes or channels, V rows of a table, B batch, H heads, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.placement import parse_sharding
from autopar.program.collectives import (
    AxisGroup,
    partial_to_invariant,
    slice_dim,
)
from autopar.program.context import causal_attention
from autopar.program.experts import split_experts
from autopar.program.norms import batch_norm
from autopar.program.stream import StreamState

Axes = tuple[AxisGroup, ...]


def embedding_rows(
    weight: Tensor,
    ids: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    row_axes: Axes,
    num_rows: int,
) -> Tensor:
    """Rows of this rank's slice of weight[V C]; ids that other ranks hold give zeros. Result: one term of a sum.

    `scale_grad_by_freq` and `sparse` change the gradient only and work as in ATen.
    """
    local_rows = weight.shape[0]
    first = _index(row_axes) * local_rows
    assert local_rows * _size(row_axes) == num_rows, "table is not split evenly"
    is_mine = (ids >= first) & (ids < first + local_rows)
    local_padding = padding_idx - first if first <= padding_idx < first + local_rows else -1
    local_ids = torch.where(is_mine, ids - first, 0)
    rows: Tensor = torch.ops.aten.embedding.default(weight, local_ids, local_padding, scale_grad_by_freq, sparse)
    return rows.masked_fill(~is_mine.unsqueeze(-1), 0.0)


def cross_entropy(  # noqa: PLR0917 - the order of ATen
    logits: Tensor,
    target: Tensor,
    weight: None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    token_axes: Axes,
    class_axes: Axes,
) -> Tensor:
    """logits[N C], target[N]: this rank's term of the mean over all tokens, on any rank, that are not ignored."""
    count = Count((target != ignore_index).sum(), token_axes)
    if class_axes:
        total = _class_split_losses(logits, target, ignore_index, class_axes).sum()
    else:
        total = torch.nn.functional.cross_entropy(
            logits, target, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
        )
    return total / count.value().to(total.dtype)


class Count:
    """A sum over the ranks of some axes, under way over the first of several while the loss is computed."""

    def __init__(self, own: Tensor, axes: Axes) -> None:
        self._sum, self._axes = own, [axis for axis in axes if axis.size > 1]
        first = self._axes[0].process_group if self._axes else None
        self._work = dist.all_reduce(own, group=first, async_op=True) if self._axes else None

    def value(self) -> Tensor:
        """Waits for it."""
        if self._work is not None:
            self._work.wait()
        for axis in self._axes[1:]:
            dist.all_reduce(self._sum, group=axis.process_group)
        return self._sum


def token_loss(logits: Tensor, target: Tensor, *args: Any, token_axes: Axes, class_axes: Axes, **kwargs: Any) -> Tensor:
    """`cross_entropy` of logits[.. C] and target[..]; the other arguments are the same."""
    return cross_entropy(
        logits.flatten(0, -2), target.flatten(), *args, token_axes=token_axes, class_axes=class_axes, **kwargs
    )


def _class_split_losses(logits: Tensor, target: Tensor, ignore_index: int, axes: Axes) -> Tensor:
    """log(sum_c exp(logit_c)) - logit_target per token, 0 where ignored; whole on every rank of `axes`."""
    local_classes = logits.shape[1]
    first = _index(axes) * local_classes
    largest = logits.detach().amax(1)
    for axis in axes:
        if axis.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=axis.process_group)
    is_mine = (target >= first) & (target < first + local_classes)
    index = torch.where(is_mine, target - first, 0)
    shifted = logits - largest.unsqueeze(1)
    sum = shifted.exp().sum(1)
    chosen = shifted.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(~is_mine, 0.0)
    for axis in axes:
        sum = partial_to_invariant(sum, axis)
        chosen = partial_to_invariant(chosen, axis)
    return (sum.log() - chosen).masked_fill(target == ignore_index, 0.0)


def dropout(
    x: Tensor,
    p: float,
    train: bool,
    *,
    op_name: str,
    global_shape: Sequence[int],
    sharding: str,
    axes: Axes,
    stream: StreamState,
) -> Tensor:
    """Zero elements of x with probability p and scale the rest by 1 / (1 - p)."""
    if not train or p == 0:
        return x
    return _drop(x, p, op_name=op_name, global_shape=global_shape, sharding=sharding, axes=axes, stream=stream)


def _drop(
    x: Tensor, p: float, *, op_name: str, global_shape: Sequence[int], sharding: str, axes: Axes, stream: StreamState
) -> Tensor:
    """Every rank draws whole rows of the tensor's mask and takes its slice of them: masks agree for every mesh."""
    shape = tuple(global_shape) or (1,)
    start, length = 0, shape[0]
    pairs = list(zip(axes, parse_sharding(sharding), strict=True))
    for axis, placement in pairs:
        if placement.is_shard and placement.dim == 0:
            length //= axis.size
            start += axis.index * length
    kept = stream.uniform(op_name, shape, start, length, x.device) >= p
    for axis, placement in pairs:
        if placement.is_shard and placement.dim:
            kept = slice_dim(kept, axis, placement.dim)
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return x * (kept.reshape(x.shape).to(x.dtype) * scale)


def attention_dropout(  # noqa: PLR0917 - the order of ATen
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    op_name: str,
    global_shape: Sequence[int],
    sharding: str,
    axes: Axes,
    stream: StreamState,
) -> Tensor:
    """Attention of q[B H L E], k[B H S E], v[B H S F] whose dropout is drawn from the defined stream."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, -3)
        value = value.repeat_interleave(groups, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if is_causal:
        size = scores.shape[-2:]
        allowed = torch.ones(size, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return (
        _drop(
            weights, dropout_p, op_name=op_name, global_shape=global_shape, sharding=sharding, axes=axes, stream=stream
        )
        @ value
    )


def _size(axes: Axes) -> int:
    size = 1
    for axis in axes:
        size *= axis.size
    return size


def _index(axes: Axes) -> int:
    """Position of this rank's slice when the axes split one dim, the outermost first."""
    index = 0
    for axis in axes:
        index = index * axis.size + axis.index
    return index


LOCAL_OPERATIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "autopar.embedding_rows": embedding_rows,
        "autopar.cross_entropy": cross_entropy,
        "autopar.token_loss": token_loss,
        "autopar.batch_norm": batch_norm,
        "autopar.dropout": dropout,
        "autopar.attention_dropout": attention_dropout,
        "autopar.causal_attention": causal_attention,
        "autopar.split_experts": split_experts,
    }
)
"""Function of each `autopar.*` target that is a single call."""

NEEDS_MEMBERS = ("autopar.split_experts",)
"""Targets that also take the keyword argument `core`: the calls inside the region as one function."""

NEEDS_STREAM = ("autopar.dropout", "autopar.attention_dropout")
"""Targets that also take the keyword arguments `axes` (all of the mesh) and `stream`."""
