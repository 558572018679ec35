"""Inference: the user's model without a loss, and what its graph returns.

The model runs in evaluation mode. It is traced as for training, parameters with gradients, since that is what tells
activations from values that every stage can compute for itself; the graph is then freed of everything that backward
would need. What a step keeps until its end is what it returns, and the batch inputs, such as a cache of keys and
values.

A tensor that the model returns leaves whole, but for samples; tensors inside a nested list, tuple or dict (such as a
cache by layer) stay split as the plan has them, on the stage that makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.calls import Traced
from autopar.capture.model_source import ModelSource, accepted_parts
from autopar.errors import CaptureError, InputError
from autopar.ir.graph import Op, OpGraph, Output, Value
from autopar.rules.batch import batch_dims

LABELS = "labels"
"""Part of a batch that is left out where the model can do without: it would compute a loss."""
DECODED = "decoder_input_ids"
"""What a decoder with an encoder reads; without it Hugging Face's models make it from the labels."""


class _Keys:
    """Where the keys of what a module returns are noted while it runs."""

    def __init__(self) -> None:
        self.found: tuple[str, ...] = ()


class InferenceForward(torch.nn.Module):
    """The user's model alone: batch in, the tensors that it returns out, in order. The model is the attribute `model`.

    After a run `returned` are their keys: places in what the model returns.
    """

    def __init__(self, model: torch.nn.Module, source: ModelSource, batch: Any) -> None:
        super().__init__()
        self.model = model
        self._text = source.text
        self._accepted = accepted_parts(model, batch) if source.loss is not None else None
        self._leaves_labels = isinstance(batch, Mapping) and _does_without(LABELS, model, batch)
        self._keys = _Keys()

    @property
    def returned(self) -> tuple[str, ...]:
        """Keys of the tensors of the last run."""
        return self._keys.found

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if self._accepted is not None and kwargs:
            kwargs = {key: kwargs[key] for key in kwargs if key in self._accepted}
        elif self._accepted is not None:
            args = args[: len(self._accepted)]
        if self._leaves_labels:
            kwargs = {key: part for key, part in kwargs.items() if key != LABELS}
        output = self.model(*args, **kwargs)
        leaves = torch_adapter.tree_leaves_with_keys(output)
        tensors = [(key, leaf) for key, leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise InputError(f"{self._text}: the model returns no tensor but a {type(output).__name__}")
        self._keys.found = tuple(key for key, _ in tensors)
        return tuple(tensor for _, tensor in tensors)


def _does_without(part: str, model: torch.nn.Module, batch: Mapping[str, Any]) -> bool:
    optional = accepted_parts(model, {**batch, DECODED: None}, optional=True)
    return part in optional and (DECODED not in optional or DECODED in batch)


def kept_results(
    name: str, results: Mapping[str, str], live: Sequence[Traced], shared: set[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the graph returns: value names by key, each value once; and a note on what it leaves out.

    Raises:
        CaptureError: nothing that the model returns depends on its parameters or on data.
    """
    made = {output for op in live if op.name not in shared for output in op.outputs}
    kept = {value: key for key, value in reversed(list(results.items())) if value in made}
    left_out = [key for key, value in results.items() if value not in made]
    if results and not kept:
        raise CaptureError(f"{name}: nothing that the model returns is computed from its parameters")
    note = f"outputs that are no result of the model's parameters are left out: {', '.join(left_out)}"
    ordered = {key: value for key, value in results.items() if kept.get(value) == key}
    return ordered, (note,) if left_out else ()


def held_by_op(
    live: Sequence[Traced], values: Mapping[str, Value], outputs: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Per op, what lasts until the step is over because of it: batch inputs that it reads first, and outputs."""
    roots = {values[name].root for name in outputs}
    seen: set[str] = set()
    held: dict[str, tuple[str, ...]] = {}
    for op in live:
        data = [name for name in op.inputs if values[name].origin == "input"]
        own = [n for n in dict.fromkeys((*data, *(n for n in op.outputs if n in roots))) if n not in seen]
        seen.update(own)
        held[op.name] = tuple(own)
    return held


def as_inference(graph: OpGraph, outputs: Mapping[str, str]) -> OpGraph:
    """The graph with these outputs (value names by key), nothing of backward, and parameters without gradient."""
    frozen = {n: replace(v, requires_grad=False) if v.origin == "parameter" else v for n, v in graph.values.items()}
    bare = replace(graph, ops=tuple(_without_backward(op) for op in graph.ops), values=frozen, optimizer="none")
    dims = batch_dims(graph)
    found = (Output(value, key, "." in key, dims[value]) for key, value in outputs.items())
    return replace(bare, outputs=tuple(found))


def _without_backward(op: Op) -> Op:
    return replace(op, flops_backward=0, members=tuple(_without_backward(member) for member in op.members))
