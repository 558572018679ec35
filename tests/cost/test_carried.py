"""What a stage holds of the values that cross its cuts, beside what its ops keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.stages import StageCost, stage_costs
from autopar.cost.table import CostTables
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.software import Software
from tests.cost.decide import decide, first_finite
from tests.cost.devices import plain_cluster
from tests.toy_graphs import residual_graph

GRAPH = residual_graph(layers=6)
CUTS = (2, 4)


def costs_of(graph: OpGraph, recompute: str = "none", *, keeps_sent: bool = True) -> tuple[StageCost, ...]:
    tables = CostTables(graph, plain_cluster(), software=Software(keeps_sent=keeps_sent))
    table = tables.table(stage_mesh(1), 2)
    assert table is not None
    return stage_costs(tables, table, decide(table, first_finite(table), CUTS, recompute=recompute))


def saved_by(graph: OpGraph, which: str) -> OpGraph:
    """What each block hands on is kept because of the op that makes it, or of the first that reads it later on."""
    handed = {name: op for op in graph.ops if op.name.startswith("add_") for name in op.outputs}
    ops = []
    for op in graph.ops:
        kept = [name for name in op.saved if name not in handed]
        kept += [name for name in op.outputs if name in handed and which == "maker"]
        read = [name for name in op.inputs if name in handed and which == "reader"]
        kept += [name for name in read if all(name not in earlier.saved for earlier in ops)]
        ops.append(replace(op, saved=tuple(kept)))
    return replace(graph, ops=tuple(ops))


@pytest.mark.parametrize("which", ["maker", "reader"])
def test_each_side_of_a_cut_has_what_the_other_counts(which: str) -> None:
    costs = costs_of(saved_by(GRAPH, which))
    size = costs[1].received_bytes
    assert size > 0
    is_made = which == "maker"
    assert [cost.held_bytes for cost in costs] == [0.0, size * is_made, size * is_made]
    assert [cost.sent_bytes for cost in costs] == [size * (not is_made), size * (not is_made), 0.0]


def test_what_nothing_saves_is_held_on_both_sides() -> None:
    graph = replace(GRAPH, ops=tuple(replace(op, saved=()) for op in GRAPH.ops))
    costs = costs_of(graph)
    size = costs[1].received_bytes
    assert [(cost.held_bytes, cost.sent_bytes) for cost in costs] == [(0.0, size), (size, size), (size, 0.0)]


def test_recompute_keeps_what_came_and_what_blocks_hand_on_unless_that_is_sent_and_let_go() -> None:
    for keeps in (True, False):
        costs = costs_of(saved_by(GRAPH, "reader"), recompute="full", keeps_sent=keeps)
        size = costs[1].received_bytes
        gone = 0.0 if keeps else size
        assert [cost.held_bytes for cost in costs] == [0.0 - gone, size - gone, size]
        assert [cost.sent_bytes for cost in costs] == [0.0, 0.0, 0.0]


def test_one_stage_carries_nothing() -> None:
    tables = CostTables(GRAPH, plain_cluster())
    table = tables.table(stage_mesh(1), 2)
    assert table is not None
    (cost,) = stage_costs(tables, table, decide(table, first_finite(table)))
    assert (cost.received_bytes, cost.held_bytes, cost.sent_bytes) == (0.0, 0.0, 0.0)
