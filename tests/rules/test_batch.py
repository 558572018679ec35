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
T5 = {"layers": "2", "hidden": "16", "heads": "4", "ffn": "32", "vocab": "32", "seq": "8", "batch": "6"}


def captured(name: str) -> OpGraph:
    return capture(load_source(f"examples/{name}.py", SMALL[name])).graph


@pytest.mark.parametrize("name", SMALL)
def test_every_op_on_samples_has_a_data_parallel_strategy(name: str) -> None:
    graph = captured(name)
    dims = batch_dims(graph)
    for op in graph.ops:
        if graph.values[op.outputs[0]].requires_grad and any(dims[i] is not None for i in op.inputs):
            assert batch_strategy(op, graph.values, dims, graph.batch_size) is not None, op


def grown_dims(name: str, options: dict[str, str]) -> dict[str, list[int]]:
    """Dims of differentiable values that grow with the batch."""
    source = load_source(f"examples/{name}.py", options)
    graph, twice = capture(source).graph, capture(source, batch_size=2 * int(options["batch"])).graph
    shapes = {
        value.name: zip(value.meta.shape, twice.values[value.name].meta.shape, strict=True)
        for value in graph.values.values()
        if value.requires_grad
    }
    return {name: [i for i, (once, more) in enumerate(pairs) if once != more] for name, pairs in shapes.items()}


def found_dims(name: str, options: dict[str, str]) -> dict[str, list[int]]:
    """Batch dims of differentiable values."""
    graph = capture(load_source(f"examples/{name}.py", options)).graph
    return {v: [] if dim is None else [dim] for v, dim in batch_dims(graph).items() if graph.values[v].requires_grad}


@pytest.mark.parametrize("name", SMALL)
def test_batch_dims_are_where_sizes_grow_with_the_batch(name: str) -> None:
    assert found_dims(name, SMALL[name]) == grown_dims(name, SMALL[name])


@pytest.mark.parametrize("target", ["4", "6"])
def test_biases_of_positions_are_no_samples_though_there_are_as_many(target: str) -> None:
    """T5 looks biases up by distances of positions, and adds them to masks that have samples."""
    options = {**T5, "target": target}
    assert found_dims("t5", options) == grown_dims("t5", options)


def test_a_sequence_as_long_as_the_batch_is_no_batch() -> None:
    """Learned positions are looked up by ids made from sizes alone, here as many as there are samples."""
    equal = capture(
        load_source("gpt", {"layers": "2", "hidden": "32", "heads": "2", "seq": "16", "vocab": "64"}), batch_size=16
    ).graph
    other = capture(
        load_source("gpt", {"layers": "2", "hidden": "32", "heads": "2", "seq": "8", "vocab": "64"}), batch_size=16
    ).graph
    assert batch_dims(equal) == batch_dims(other)
