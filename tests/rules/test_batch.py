"""The batch is followed through whole models: every differentiable activation of them counts samples somewhere."""

from __future__ import annotations

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.ir.graph import OpGraph
from autopar.rules.batch import batch_dims, batch_strategy

SMALL = {
    "gpt2": {"layers": "2", "hidden": "16", "heads": "4", "vocab": "32", "seq": "8", "batch": "6"},
    "bert": {"layers": "2", "hidden": "16", "heads": "4", "vocab": "32", "seq": "8", "batch": "6"},
    "alexnet": {"batch": "6"},
    "mlp": {"batch": "6"},
    "resnet": {"batch": "6"},
}


def captured(name: str) -> OpGraph:
    return capture(load_source(f"examples/{name}.py", SMALL[name])).graph


@pytest.mark.parametrize("name", SMALL)
def test_every_op_on_samples_has_a_data_parallel_strategy(name: str) -> None:
    graph = captured(name)
    dims = batch_dims(graph)
    for op in graph.ops:
        if graph.values[op.outputs[0]].requires_grad and any(dims[i] is not None for i in op.inputs):
            assert batch_strategy(op, graph.values, dims, graph.batch_size) is not None, op


@pytest.mark.parametrize("name", SMALL)
def test_batch_dims_are_where_sizes_grow_with_the_batch(name: str) -> None:
    graph = captured(name)
    twice = capture(load_source(f"examples/{name}.py", SMALL[name]), batch_size=12).graph
    for value, dim in batch_dims(graph).items():
        shape, larger = graph.values[value].meta.shape, twice.values[value].meta.shape
        grown = [i for i, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b]
        if graph.values[value].requires_grad:
            assert grown == ([] if dim is None else [dim]), value


def test_a_sequence_as_long_as_the_batch_is_no_batch() -> None:
    """Learned positions are looked up by ids made from sizes alone, here as many as there are samples."""
    equal = capture(
        load_source("gpt", {"layers": "2", "hidden": "32", "heads": "2", "seq": "16", "vocab": "64"}), batch_size=16
    ).graph
    other = capture(
        load_source("gpt", {"layers": "2", "hidden": "32", "heads": "2", "seq": "8", "vocab": "64"}), batch_size=16
    ).graph
    assert batch_dims(equal) == batch_dims(other)
