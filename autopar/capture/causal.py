"""Masks that are causal by construction: attention under them becomes `is_causal`, and the mask is not made at all.

A mask made from sizes alone (no batch input, no buffer) is a constant. Model libraries build the causal one from
positions by broadcasting, [.. s 1] against [.. 1 s]: as large as the scores, though nothing but `column <= row`. Here
the vectors are computed as they are and the comparison of two of them is decided in linear time, so a mask of 131072
by 131072 costs a sort of 131072 numbers. A mask that is not proved causal stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autopar import torch_adapter
from autopar.capture.flops import causal_scores
from autopar.capture.saved import ATTENTION
from autopar.ir.graph import Arg, Op, Ref, Value

SMALL = 1 << 24
"""Constants of up to so many elements are computed; larger ones are described."""
ALL, CAUSAL = "all", "causal"
ANDS = ("aten.__and__.Tensor", "aten.bitwise_and.Tensor", "aten.logical_and.default")
ORDERS = ("aten.le.Tensor", "aten.ge.Tensor")
KEEPS = ("aten.expand.default", "aten.unsqueeze.default", "aten.contiguous.default", "aten.alias.default")
"""Ops that keep the last two dims as they are, if their sizes stay."""


def make_causal(ops: list[Op], values: Mapping[str, Value]) -> list[Op]:
    """Attention with `is_causal` in place of a mask that is proved causal; the masks' ops stay (they may be dead)."""
    masks = _Constants({name: op for op in ops for name in op.outputs}, values)
    return [_without_mask(op, values) if _has_causal_mask(op, values, masks) else op for op in ops]


def _has_causal_mask(op: Op, values: Mapping[str, Value], masks: _Constants) -> bool:
    mask = op.args[3] if len(op.args) > 3 else op.kwargs.get("attn_mask")
    if op.target != ATTENTION or not isinstance(mask, Ref) or len(op.args) > 4:
        return False
    meta = values[op.inputs[mask.index]].meta
    rows, columns = (values[op.inputs[i]].meta.shape[-2] for i in (0, 1))
    is_whole = meta.dtype == "bool" and meta.shape[-2:] == (rows, columns) and rows == columns
    return is_whole and mask.index == len(op.inputs) - 1 and masks.pattern(op.inputs[mask.index]) == CAUSAL


def _without_mask(op: Op, values: Mapping[str, Value]) -> Op:
    """The mask is the last input; a boolean one was counted as saved in the query's dtype (see `capture.saved`)."""
    query, mask = values[op.inputs[0]].meta, values[op.inputs[-1]].meta
    kept = mask.numel * (query.num_bytes // query.numel) if values[op.outputs[0]].requires_grad else 0
    rows, columns = query.shape[-2], mask.shape[-1]
    share = causal_scores(rows, columns) / (rows * columns)
    kwargs: dict[str, Arg] = {key: arg for key, arg in op.kwargs.items() if key != "attn_mask"}
    return replace(
        op,
        inputs=op.inputs[:-1],
        args=op.args[:3],
        kwargs={**kwargs, "is_causal": True},
        saved_extra_bytes=op.saved_extra_bytes - kept,
        flops_forward=round(op.flops_forward * share),
        flops_backward=round(op.flops_backward * share),
    )


@dataclass
class _Constants:
    """Values that follow from sizes alone: computed where small, else described as ALL or CAUSAL."""

    producers: Mapping[str, Op]
    values: Mapping[str, Value]
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    patterns: dict[str, str | None] = field(default_factory=dict)

    def pattern(self, name: str) -> str | None:
        """What the last two dims of a boolean constant are, the same for all leading indices; None if unknown."""
        if name not in self.patterns:
            self.patterns[name] = self._pattern(name)
        return self.patterns[name]

    def _pattern(self, name: str) -> str | None:
        tensor = self.tensor(name)
        if tensor is not None:
            return _pattern_of(tensor)
        op = self.producers.get(name)
        if op is None:
            return None
        if op.target in KEEPS and self.values[op.inputs[0]].meta.shape[-2:] == self.values[name].meta.shape[-2:]:
            return self.pattern(op.inputs[0])
        if op.target in ANDS:
            found = {self.pattern(n) for n in op.inputs}
            return None if None in found else CAUSAL if CAUSAL in found else ALL
        if op.target in ORDERS or op.target == "aten.eq.Tensor":
            return self._comparison(op)
        return None

    def _comparison(self, op: Op) -> str | None:
        """[.. 1 s] against [.. s 1] (or the other way round for `ge`)."""
        operands = [self.tensor(name) for name in op.inputs]
        if len(operands) != 2 or any(t is None or t.dim() < 2 for t in operands):
            return None
        first, second = (t for t in operands if t is not None)
        if op.target == "aten.eq.Tensor":
            both = torch.cat([first.flatten(), second.flatten()])
            return ALL if bool((both == both[0]).all()) else None
        low, high = (first, second) if op.target == "aten.le.Tensor" else (second, first)
        if low.shape[-2] != 1 or high.shape[-1] != 1:
            return None
        columns, rows = _only_row(low.flatten(0, -2)), _only_row(high.squeeze(-1).flatten(0, -2))
        if columns is None or rows is None or not bool((columns[1:] >= columns[:-1]).all()):
            return None
        seen = torch.searchsorted(columns, rows, right=True)
        return CAUSAL if bool((seen == torch.arange(1, len(rows) + 1)).all()) else None

    def tensor(self, name: str) -> Tensor | None:
        """The constant itself, or None where it is large or depends on more than sizes."""
        if name not in self.tensors:
            self.tensors[name] = self._compute(name)
        return self.tensors[name]

    def _compute(self, name: str) -> Tensor | None:
        op = self.producers.get(name)
        is_simple = op is not None and op.is_shared and op.outputs == (name,)
        if op is None or not is_simple or math.prod(self.values[name].meta.shape) > SMALL:
            return None
        inputs = [self.tensor(n) for n in op.inputs]
        if any(t is None for t in inputs):
            return None
        args = [_decode(arg, inputs) for arg in op.args]
        found = torch_adapter.call(op.target, args, {key: _decode(arg, inputs) for key, arg in op.kwargs.items()})
        return found if isinstance(found, Tensor) else None


def _pattern_of(tensor: Tensor) -> str | None:
    if tensor.dtype != torch.bool:
        return None
    if bool(tensor.all()):
        return ALL
    return CAUSAL if tensor.dim() >= 2 and bool((tensor == torch.ones_like(tensor).tril()).all()) else None


def _only_row(rows: Tensor) -> Tensor | None:
    """The row that all rows of a matrix equal."""
    return rows[0].contiguous() if bool((rows == rows[:1]).all()) else None


def _decode(arg: Arg, inputs: list[Tensor | None]) -> Any:
    if isinstance(arg, Ref):
        return inputs[arg.index]
    if isinstance(arg, tuple):
        return [_decode(part, inputs) for part in arg]
    return torch_adapter.decode_constant(arg, "cpu")
