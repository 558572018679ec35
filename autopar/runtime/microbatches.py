"""Microbatches: a global batch in equal parts along each input's batch dim."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from autopar.errors import InputError
from autopar.ir.graph import Value


def split_batch(inputs: Sequence[Value], count: int, batch: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """`count` parts of a batch by name of the input; inputs without a batch dim are whole in each.

    Args:
        inputs: batch inputs of the graph, which is of one microbatch.
        count: microbatches.
        batch: the whole global batch, one tensor per input.

    Raises:
        InputError: if the batch does not fit the graph.
    """
    if len(batch) != len(inputs):
        raise InputError(f"the batch has {len(batch)} tensors, the model reads {len(inputs)}")
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for value, tensor in zip(inputs, batch, strict=True):
        dim = value.batch_dim
        expected = tuple(size * (count if i == dim else 1) for i, size in enumerate(value.meta.shape))
        if tuple(tensor.shape) != expected:
            raise InputError(f"batch input {value.fqn}: shape {tuple(tensor.shape)}, the plan needs {expected}")
        pieces = tensor.chunk(count, dim) if dim is not None else (tensor,) * count
        for part, piece in zip(parts, pieces, strict=True):
            part[value.name] = piece
    return parts
