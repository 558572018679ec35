"""Promotion: the same graph in one other floating dtype, typically float64 for verification.

The ops stay those of the model's own dtypes (a `to.dtype` that has become a no-op stays), so a plan made for the
model names the same ops. Every floating value, and every constant that names a floating dtype, becomes the new
one. FLOPs, saved tensors and storage roots are left as they are: they describe the original.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Arg, Op, OpGraph
from autopar.ir.tensor import TensorMeta

GROUPED_ANY_DTYPE = {"aten._grouped_mm.default": "transformers.grouped_mm_fallback.default"}
"""Kernels that exist in bfloat16 alone, and their equals for any dtype (same arguments)."""


def promote(graph: OpGraph, dtype: str) -> OpGraph:
    """The graph with all floating dtypes replaced by `dtype`, e.g. `float64`."""
    values = {name: replace(value, meta=_meta(value.meta, dtype)) for name, value in graph.values.items()}
    return replace(graph, ops=tuple(_op(op, dtype) for op in graph.ops), values=values)


def _meta(meta: TensorMeta, dtype: str) -> TensorMeta:
    return TensorMeta(meta.shape, dtype) if meta.dtype.startswith(("float", "bfloat")) else meta


def _op(op: Op, dtype: str) -> Op:
    return replace(
        op,
        target=GROUPED_ANY_DTYPE.get(op.target, op.target),
        args=tuple(_argument(arg, dtype) for arg in op.args),
        kwargs={key: _argument(arg, dtype) for key, arg in op.kwargs.items()},
        members=tuple(_op(member, dtype) for member in op.members),
    )


def _argument(argument: Arg, dtype: str) -> Arg:
    if isinstance(argument, tuple):
        return tuple(_argument(part, dtype) for part in argument)
    if isinstance(argument, str) and argument.startswith(("dtype:float", "dtype:bfloat")):
        return f"dtype:{dtype}"
    return argument
