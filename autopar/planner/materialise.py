"""Capturing for execution: the graph as planned, with real tensors.

The graph is traced without data, exactly like the plan's. Tracing on the device of the run could give another one:
kernels lay their results out differently there, and `contiguous` calls come and go. Weights and batch are then
made for real beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.export import (
    Captured,
    TrainForward,
    capture,
    forward_module,
    has_samples,
    quiet,
    tensor_leaves,
)
from autopar.capture.model_source import ModelSource, as_arguments, leading_dim
from autopar.capture.single import as_for_several
from autopar.errors import CaptureError
from autopar.ir.graph import OpGraph


def capture_for_run(source: ModelSource, *, batch_size: int, device: str, num_microbatches: int = 1) -> Captured:
    """The graph for `batch_size` samples with a module and inputs on the device.

    The caller seeds torch for reproducible weights; they are drawn on the CPU whatever the device. In one of several
    microbatches, ops and names are those of the whole batch (`capture.single`).

    Raises:
        CaptureError: the model's code makes a constant whose value is unknown without running it.
    """
    captured = capture(source, batch_size=batch_size)
    if batch_size == 1 and num_microbatches > 1:
        captured = replace(captured, graph=_as_for_several(source, captured.graph))
    for name, constant in captured.constants.items():
        if constant.is_meta:
            raise CaptureError(f"{source.text}: the model makes a tensor on the meta device that it reads as {name}")
    with quiet():
        model = source.build_model().to(device)
    return replace(
        captured,
        module=forward_module(source, model, source.raw_batch()),
        constants={name: constant.to(device) for name, constant in captured.constants.items()},
        inputs=sized_batch(source, batch_size, device),
    )


def graph_of_part(source: ModelSource, batch_size: int) -> OpGraph:
    """The graph for one of several parts of a batch, of `batch_size` samples; ops and names are those of the whole."""
    graph = capture(source, batch_size=batch_size).graph
    return _as_for_several(source, graph) if batch_size == 1 else graph


def _as_for_several(source: ModelSource, single: OpGraph) -> OpGraph:
    return as_for_several(single, capture(source, batch_size=2).graph)


def sized_batch(source: ModelSource, batch_size: int, device: str) -> tuple[torch.Tensor, ...]:
    """The example batch with `batch_size` samples, in graph order: cut, or repeated from its start, as needed."""
    with quiet():
        raw = source.raw_batch()
    samples = leading_dim(raw, source.text)
    chosen = torch.arange(batch_size) % samples
    leaves = [leaf.detach() for _, leaf in tensor_leaves(*as_arguments(raw))]
    return tuple((leaf[chosen] if has_samples(leaf, samples) else leaf).to(device) for leaf in leaves)


def seeded_module(source: ModelSource, seed: int) -> torch.nn.Module:
    """The model with its loss, on the CPU, in training mode; equal wherever the seed is."""
    torch.manual_seed(seed)
    with quiet():
        return TrainForward(source.build_model(), source, source.raw_batch()).train()


def part_of_batch(
    source: ModelSource, batch_size: int, part: int, num_parts: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that hold one of so many equal parts of `batch_size` samples, as `sized_batch` makes them."""
    with quiet():
        raw = source.raw_batch()
    samples, length = leading_dim(raw, source.text), batch_size // num_parts
    chosen = torch.arange(part * length, (part + 1) * length) % samples

    def cut(leaf: Any) -> Any:
        has_dim = isinstance(leaf, torch.Tensor) and has_samples(leaf, samples)
        return leaf.detach()[chosen] if has_dim else leaf

    return as_arguments(torch_adapter.tree_map(cut, raw))
