"""What autograd keeps from forward to backward because of one call.

Recorded by running the call on meta tensors under `saved_tensors_hooks`. Two ops are described by rule instead,
because the meta device takes another kernel than the devices that models run on:

- `scaled_dot_product_attention` without dropout has flash semantics: query, key, value, output and a float32
  log-sum-exp per query row, the output stored by (batch, position, head). A boolean mask is turned into a mask of the
  query's dtype, which is kept too (torch `convert_boolean_attn_mask`), and so is a mask with a gradient
  (memory-efficient kernel of CUDA; the CPU takes an unfused road there and keeps the weights instead). With dropout
  the attention weights and their mask are kept too.
- `dropout` keeps its mask as one byte per element (torch `native_dropout`).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from autopar import torch_adapter

ATTENTION = "aten.scaled_dot_product_attention.default"
DROPOUT = "aten.dropout.default"


def run_and_record(target: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[int, int], int]:
    """Result of the call, kept storages (key -> bytes) and bytes kept that no storage of the run stands for."""
    name = torch_adapter.target_name(target)
    if name == ATTENTION:
        result = _fused_layout(target(*args, **kwargs))
        return result, *_attention(result, args, kwargs)
    if name == DROPOUT:
        result = target(*args, **kwargs)
        return result, {}, result.numel() if result.requires_grad else 0
    packed: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed[torch_adapter.storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = target(*args, **kwargs)
    return result, packed, 0


def attention_arguments(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `scaled_dot_product_attention` by name, defaults filled in."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _fused_layout(result: torch.Tensor) -> torch.Tensor:
    """Fused kernels store the output by (batch, position, head), so that merging the heads copies nothing."""
    return result.transpose(1, 2).contiguous().transpose(1, 2) if result.dim() == 4 else result


def _attention(result: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[dict[int, int], int]:
    if not result.requires_grad:
        return {}, 0
    given = attention_arguments(args, kwargs)
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    rows = math.prod(query.shape[:-1])
    kept = [query, key, given["value"], result]
    extra = 4 * rows
    if mask is not None and mask.dtype == torch.bool:
        extra += mask.numel() * query.element_size()
    elif mask is not None:
        kept.append(mask)
    if given["dropout_p"]:
        extra += rows * key.shape[-2] * (query.element_size() + 1)
    packed = {torch_adapter.storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    return packed, extra
