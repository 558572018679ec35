"""Sequence and context parallelism as the search sees it: the options, their movements and their prices."""

from __future__ import annotations

import numpy as np
import pytest

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.cost.hardware import load_cluster
from autopar.cost.table import CostTables
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.placement import PARTIAL, REPLICATE, shard
from autopar.rules.redistribute import redistribute_steps
from autopar.rules.strategies import axis_strategies
from tests.dist.decisions import sequence_strategies

ROWS, HEADS = shard(2), shard(1)
SMALL = {
    "gpt2": {"layers": "2", "hidden": "32", "heads": "4", "vocab": "64", "seq": "8", "batch": "4"},
    "llama": {"layers": "2", "hidden": "64", "heads": "16", "kv_heads": "8", "ffn": "48", "vocab": "64", "seq": "8",
              "batch": "4"},
}  # fmt: skip


@pytest.fixture(scope="module", params=SMALL)
def graph(request: pytest.FixtureRequest) -> OpGraph:
    return capture(load_source(f"examples/{request.param}.py", SMALL[request.param])).graph


@pytest.mark.parametrize("label", ["context", "dim1"])
def test_every_op_on_activations_runs_on_a_slice_of_the_sequence(graph: OpGraph, label: str) -> None:
    chosen = sequence_strategies(graph, label)
    for op in graph.ops:
        if any(graph.values[name].requires_grad and graph.values[name].origin == "op" for name in op.inputs):
            of_parameter = graph.values[graph.values[op.inputs[0]].root].origin == "parameter"
            assert op.name in chosen or of_parameter, op
    assert chosen[graph.producers()[graph.loss].name].outputs == (PARTIAL,)


def test_attention_on_rows_needs_whole_keys_and_values(graph: OpGraph) -> None:
    (op, *_) = [op for op in graph.ops if op.target == "aten.scaled_dot_product_attention.default"]
    (context,) = [s for s in axis_strategies(op, graph.values) if s.label == "context"]
    assert (context.inputs, context.outputs) == ((ROWS, REPLICATE, REPLICATE), (ROWS,))


@pytest.mark.parametrize(("source", "target"), [(ROWS, HEADS), (HEADS, ROWS)], ids=str)
def test_from_sequence_to_heads_is_one_exchange(source: object, target: object) -> None:
    for whole in ((), (REPLICATE,)):
        (step,) = redistribute_steps((*whole, source), (*whole, target), (2,) * (len(whole) + 1), True) or ()
        assert (step.forward, step.backward) == ("all_to_all", "all_to_all")


def test_the_table_offers_exchanges_around_attention_at_their_price(graph: OpGraph) -> None:
    """Edges between rows of q and heads in attention cost an all_to_all, which is below the gather of the same."""
    tables = CostTables(graph, load_cluster("h100-sxm-80gb", 4))
    table = tables.table(stage_mesh(1, 4), 1)
    assert table is not None
    index, node = next((i, n) for i, n in enumerate(table.nodes) if "scaled_dot_product" in n.name)
    labels = [choice[1].label for choice in node.choices]
    assert {"dim1", "context"} <= set(labels)
    edge = next(e for e in table.edges if e.target == index)
    queries = [choice[1].outputs[0] if hasattr(choice[1], "outputs") else choice[1]
               for choice in table.nodes[edge.source].choices]  # fmt: skip
    prices = edge.forward_s[queries.index(ROWS)]
    assert 0 < prices[labels.index("dim1")] < np.inf
    assert prices[labels.index("context")] == 0
    assert prices[labels.index("dim1")] < prices[labels.index("replicate")]
