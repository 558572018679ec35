"""The sequence is followed through whole models, and what lies between two tensor-parallel parts is found."""

from __future__ import annotations

from functools import cache

import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.ir.graph import OpGraph
from autopar.rules.batch import batch_dims
from autopar.rules.sequence import SequenceParts, sequence_dims, sequence_parts, sequence_strategy
from autopar.rules.strategies import axis_strategies

SIZES = {"layers": "2", "hidden": "32", "heads": "4", "vocab": "64", "batch": "6"}
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "gpt": ("gpt", {"dropout": "0.1"}),
    "gpt unfused": ("gpt", {"attention": "unfused", "dropout": "0.1", "positions": "alibi"}),
    "llama": ("llama", {"kv_heads": "2"}),
    "llama of the library": ("examples/llama.py", {"kv_heads": "2", "ffn": "64"}),
    "gpt2 of the library": ("examples/gpt2.py", {}),
    "bert of the library": ("examples/bert.py", {}),
}


@cache
def graph_of(name: str, seq: int = 16) -> OpGraph:
    source, options = MODELS[name]
    return capture(load_source(source, {**SIZES, **options, "seq": str(seq)})).graph


@cache
def parts_of(name: str) -> SequenceParts:
    graph = graph_of(name)
    return sequence_parts(graph, batch_dims(graph))


@pytest.mark.parametrize("name", MODELS)
def test_sequence_dims_are_where_sizes_grow_with_the_sequence(name: str) -> None:
    graph, longer = graph_of(name), graph_of(name, 32)
    dims = sequence_dims(graph)
    for value in (name for op in graph.ops for name in op.outputs):
        dim, shape, other = dims[value], graph.values[value].meta.shape, longer.values[value].meta.shape
        grown = [i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
        if graph.values[value].requires_grad:
            assert dim in grown or (dim is None and not grown), value


@pytest.mark.parametrize("name", MODELS)
def test_every_op_that_has_the_sequence_can_follow_it(name: str) -> None:
    graph, dims = graph_of(name), parts_of(name).dims
    for op in graph.ops:
        if graph.values[op.outputs[0]].requires_grad and any(dims[i] is not None for i in op.inputs):
            is_whole = name == "gpt" and "attention" in op.target  # causal attention with dropout draws whole rows
            assert (sequence_strategy(op, graph.values, dims) is None) == is_whole, op


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_norms_dropout_and_sums(name: str) -> None:
    graph, stream = graph_of(name), parts_of(name).stream
    per_layer = {"gpt": 6, "gpt unfused": 6, "llama": 4}
    layer = [op for op in graph.ops if op.module_path.startswith("layers.1") and op.name in stream]
    assert len(layer) == per_layer.get(name, len(layer))
    for op in graph.ops:
        if "norm" in op.target:
            assert op.name in stream, op
        if any(name in op.target for name in ("linear", "matmul", "attention", "softmax", "split", "silu")):
            assert op.name not in stream, op
        if op.name in stream:
            assert graph.values[op.outputs[0]].meta.shape[-1] in (1, 32), op


def test_tokens_are_looked_up_in_the_embedding_and_positions_are_not() -> None:
    graph = graph_of("gpt")
    lookups = [op for op in graph.ops if op.name in parts_of("gpt").lookups]
    assert [op.module_path for op in lookups] == ["embedding"]


def test_splitting_is_seen_on_operands_and_results() -> None:
    graph, parts = graph_of("gpt unfused"), parts_of("gpt unfused")
    first = next(op for op in graph.ops if "matmul" in op.target)
    found = {s.label: parts.splits(first, s) for s in axis_strategies(first, graph.values)}
    assert found == {
        "replicate": False, "dim0": False, "dim1": False, "dim2": True, "columns": True, "contract": False
    }  # fmt: skip


def test_images_have_no_sequence() -> None:
    graph = capture(load_source("examples/alexnet.py", {"batch": "6"})).graph
    parts = sequence_parts(graph, batch_dims(graph))
    assert set(parts.dims.values()) == {None}
    assert (parts.stream, parts.lookups) == (frozenset(), frozenset())
