"""FLOPs of one call from the shapes of its operands and results; multiply and add count as two.

| ops                                        | forward                        | backward                              |
|--------------------------------------------|--------------------------------|---------------------------------------|
| matmul family, convolutions, grouped       | 2 m n k (torch's flop counter) | the forward's, per operand with grad  |
| scaled_dot_product_attention               | 4 B H L S E (E = Ev)           | 2.5 x forward (recomputes the scores) |
| the same, is_causal, L = S                 | 2 B H L (L + 1) E              | the same                              |
| every other op that makes new storage      | 1 per output element           | 1 per output element with gradient    |
| views                                      | 0                              | 0                                     |

Transcendental functions and reductions are not weighted: such ops are bound by memory traffic anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from autopar import torch_adapter
from autopar.capture.saved import ATTENTION, attention_arguments

MATRIX_OPS = frozenset((
    "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "inner", "einsum", "tensordot",
    "bilinear", "chain_matmul", "addr", "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d",
))  # fmt: skip
GROUPED = frozenset(("_grouped_mm", "grouped_mm_fallback"))


def count_flops(target: str, args: Any, kwargs: dict[str, Any], results: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    """(forward, backward) of one call on meta tensors."""
    name = target.split(".")[1]
    needs_grad = any(result.requires_grad for result in results)
    if target == ATTENTION:
        forward = _attention_flops(args, kwargs)
        return forward, int(2.5 * forward) if needs_grad else 0
    if name in MATRIX_OPS or name in GROUPED:
        forward = _grouped_flops(args) if name in GROUPED else _counted(target, args, kwargs)
        return forward, forward * (_matrix_operands_with_grad(args) if needs_grad else 0)
    inputs = [leaf for leaf in torch_adapter.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    storages = {torch_adapter.storage_key(tensor) for tensor in inputs}
    fresh = sum(r.numel() for r in results if torch_adapter.storage_key(r) not in storages)
    return fresh, fresh if needs_grad else 0


def _counted(target: str, args: Any, kwargs: dict[str, Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        torch_adapter.op_overload(target)(*args, **kwargs)
    return int(counter.get_total_flops())


def _grouped_flops(args: Any) -> int:
    rows, inner = args[0].shape[-2:]
    return int(2 * rows * inner * args[1].shape[-1])


def _matrix_operands_with_grad(args: Any) -> int:
    """Of the operands that are multiplied (at least two dims; a bias has one), how many need a gradient."""
    tensors = [leaf for leaf in torch_adapter.tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]
    return min(2, sum(tensor.requires_grad for tensor in tensors))


def _attention_flops(args: Any, kwargs: dict[str, Any]) -> int:
    given = attention_arguments(args, kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    rows, columns = query.shape[-2], key.shape[-2]
    seen = causal_scores(rows, columns) if given["is_causal"] else rows * columns
    return int(2 * math.prod(query.shape[:-2]) * seen * (query.shape[-1] + value.shape[-1]))


def causal_scores(rows: int, columns: int) -> int:
    """How many pairs of a row and a column that is not later: row i sees min(i + 1, columns)."""
    square = min(rows, columns)
    return square * (square + 1) // 2 + (rows - square) * columns
