"""What sort of work an op is: which rate its FLOPs run at, which bytes it moves, whether it is a kernel at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from autopar.ir.graph import Op, OpGraph, Value
from autopar.rules.recompute import ATTENTIONS, GEMMS
from autopar.rules.table import packet

CONVOLUTIONS = frozenset(f"{name}{dims}d" for name in ("conv", "conv_transpose") for dims in (1, 2, 3))
CAUSAL_BLOCK = 128
"""Positions of a block of fused attention."""
SELECTING_VIEWS = frozenset(("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow"))
"""Views whose backward writes a whole zero-filled gradient."""
GROWING_VIEWS = frozenset(("expand", "expand_as", "broadcast_to"))
"""Views whose backward is a sum."""
HEADER_VIEWS = frozenset(
    ("view", "transpose", "permute", "t", "numpy_T", "unsqueeze", "squeeze", "detach", "alias", "unflatten", "view_as")
) | {"_unsafe_view"}  # fmt: skip
"""Views whose backward is a view."""
VIEWS = HEADER_VIEWS | SELECTING_VIEWS | GROWING_VIEWS
LOOKUPS = frozenset(("embedding", "gather", "index", "index_select"))
"""Ops that read only the rows they return, not the whole table."""
NORMS = frozenset(("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm"))


def work_kind(op: Op) -> str:
    """`gemm`, `convolution`, `attention` or `other`: the rate at which the op's FLOPs run."""
    name = packet(op.target)
    if name in GEMMS:
        return "gemm"
    if name in CONVOLUTIONS:
        return "convolution"
    return "attention" if name in ATTENTIONS else "other"


def as_run_by(graph: OpGraph, kind: str) -> OpGraph:
    """The graph with what its ops save and compute on this kind of device.

    GPUs run `rms_norm` as one kernel, which saves its operand and a float32 per row; the parts that it is made of
    elsewhere save float32 copies of operand and result (aten `_fused_rms_norm`, since PyTorch 2.8). Their causal
    attention skips whole blocks of `CAUSAL_BLOCK` positions alone (Dao 2023).
    """
    if kind != "gpu":
        return graph
    return replace(graph, ops=tuple(_on_gpu(op, graph.values) for op in graph.ops))


def _on_gpu(op: Op, values: Mapping[str, Value]) -> Op:
    name = packet(op.target)
    if name == "rms_norm" and op.saved_extra_bytes:
        operand = values[op.inputs[0]].meta
        rows = math.prod(operand.shape[:-1])
        return replace(op, saved_extra_bytes=min(op.saved_extra_bytes, operand.num_bytes + 4 * rows))
    if name in ATTENTIONS and op.kwargs.get("is_causal"):
        share = _computed_share(values[op.inputs[0]].meta.shape[-2])
        return replace(
            op, flops_forward=round(op.flops_forward * share), flops_backward=round(op.flops_backward * share)
        )
    return op


def _computed_share(positions: int) -> float:
    """Scores that causal attention computes in whole blocks, over those that it needs."""
    block = min(CAUSAL_BLOCK, positions)
    blocks = -(-positions // block)
    return block * block * blocks * (blocks + 1) / (positions * (positions + 1))


def is_view(op: Op, values: Mapping[str, Value]) -> bool:
    """Whether forward only makes new tensor headers.

    A reshape, cast or dropout that capture found to share its operand's storage is a view too; ops that change
    their operand in place (`relu_`) share storage but do work.
    """
    name = packet(op.target)
    if name in VIEWS:
        return True
    if name.endswith("_") or op.mutates or not op.outputs:
        return False
    return all(values[output].root != output for output in op.outputs)


def matrix_operands(op: Op, values: Mapping[str, Value]) -> tuple[int, int, int] | None:
    """Where A, B and C = A B of a (batched) GEMM stand among operands and results; None for other ops."""
    name = packet(op.target)
    if name not in GEMMS or op.members or not op.flops_forward:
        return None
    first = 1 if name in ("addmm", "baddbmm") else 0
    if len(op.inputs) < first + 2 or len(op.outputs) != 1:
        return None
    is_matrix = all(len(values[v].meta.shape) >= 2 for v in op.inputs[first : first + 2])
    is_one = name != "einsum" or len(op.inputs) == 2
    return (first, first + 1, len(op.inputs)) if is_matrix and is_one else None
