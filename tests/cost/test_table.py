"""Cost tables against numbers worked out by hand, and properties that hold for every table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.collective import collective_cost
from autopar.cost.device import Link
from autopar.cost.hardware import Cluster
from autopar.cost.predict import predict
from autopar.cost.stages import chosen
from autopar.cost.table import CostTables
from autopar.errors import InputError
from autopar.ir.cost import CostNode, CostTable
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import Group, stage_mesh
from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, shard
from autopar.ir.solution import Pins
from tests.cost.decide import decide
from tests.cost.devices import plain_cluster
from tests.toy_graphs import attention_graph, mlp_graph, residual_graph

TWO_OPS = mlp_graph(8, (4, 8), bias=False)
"""x[8 4] -> linear with w[8 4] -> y[8 8] -> mean-squared loss against target[8 8], float32."""
GRAPHS = {"mlp": mlp_graph(), "residual": residual_graph(), "attention": attention_graph()}


def make(graph: OpGraph, *sizes: int, microbatches: int = 1, cluster: Cluster | None = None, **pins: Any) -> CostTable:
    table = CostTables(graph, cluster or plain_cluster(), pins=Pins(**pins)).table(stage_mesh(*sizes), microbatches)
    assert table is not None
    return table


def node_of(table: CostTable, name: str) -> CostNode:
    return next(node for node in table.nodes if node.name == name)


def labels(node: CostNode, axis: int = 0) -> list[str]:
    return [choice[axis].label for choice in node.choices]


def test_data_parallel_step_of_two_ops_equals_the_hand_computed_sum() -> None:
    tables = CostTables(TWO_OPS, plain_cluster(), pins=Pins(dp=2))
    table = tables.table(stage_mesh(2), 1)
    assert table is not None

    def pick(node: CostNode) -> int:
        return labels(node).index("replicated") if node.kind == "param" else 0

    predicted = predict(tables, decide(table, pick))
    # linear on 4 of 8 rows: 256 FLOP (0.26 ns) against 64 + 128 + 128 bytes (3.2 ns); backward reads the operand and
    # the result's gradient and writes the weight's: as many
    # loss: 128 + 128 + 4 bytes (2.6 ns); backward reads those and writes 128; its sum over the ranks: 4 bytes at
    # 10 GB/s (0.4 ns)
    # gradient of 128 bytes: 2 * 1/2 * 128 B / 10 GB/s (12.8 ns); AdamW: 7 passes of 128 B (8.96 ns)
    assert predicted.stages[0].forward_s.value == pytest.approx(3.2e-9 + 2.6e-9 + 0.4e-9)
    assert predicted.stages[0].backward_s.value == pytest.approx(3.2e-9 + 3.88e-9)
    assert predicted.stages[0].step_s.value == pytest.approx(12.8e-9 + 8.96e-9)
    assert predicted.step_time_s.value == pytest.approx(35.04e-9)
    # parameter, gradient and two states of 128 B; kept: both whole batch inputs (128, 256), 4 rows of y (128);
    # at work in the linear: 4 rows of y and the weight's gradient
    assert predicted.stages[0].memory_by_cause == {
        "parameters": 128.0, "gradients": 128.0, "optimizer": 256.0,
        "activations": pytest.approx(128 + 128 + 256), "workspace": 128.0 + 128.0,
    }  # fmt: skip
    # 256 FLOP at 50 pJ and 640 B at 0.25 nJ for the linear, 648 B for the loss, 7 * 128 B for AdamW; two devices
    dynamic = 2 * (2 * 256 * 5e-11 + (640 + 648 + 896) * 2.5e-10)
    assert predicted.energy_by_cause["dynamic"] == pytest.approx(dynamic)
    assert predicted.energy_by_cause["blocked"] == pytest.approx(2 * 50 * 35.04e-9)
    assert predicted.energy_by_cause["host"] == pytest.approx(200 * 35.04e-9)
    assert predicted.tdp_energy_j == pytest.approx(2 * 150 * 35.04e-9)


def test_linear_under_each_single_axis_strategy_moves_its_hand_computed_bytes() -> None:
    node = node_of(make(TWO_OPS, 2), "linear_0")
    found = {
        (str(choice[0].inputs[0]), str(choice[0].inputs[1])): round(seconds * 1e11)
        for choice, seconds in zip(node.choices, node.forward_s, strict=True)
    }
    # bytes of x, w and y: 128, 128, 256 whole
    assert found["I", "I"] == 512
    assert found["S0", "R"] == 64 + 128 + 128
    assert found["R", "S0"] == 128 + 64 + 128
    assert found["S1", "S1"] == 64 + 64 + 256


def test_parameter_rows_pay_their_collectives() -> None:
    node = node_of(make(TWO_OPS, 2), "param:linear_0_weight")
    row = {label: index for index, label in reversed(list(enumerate(labels(node))))}
    adam = 7 * 128 / 1e11
    assert node.step_s[row["invariant"]] == pytest.approx(adam)
    assert node.step_s[row["replicated"]] == pytest.approx(adam + 12.8e-9)
    assert node.step_s[row["zero1"]] == pytest.approx(adam / 2 + 12.8e-9)
    assert node.step_s[row["zero3"]] == pytest.approx(adam / 2)
    # gather 128 B twice, reduce_scatter once: 1/2 * 128 B / 10 GB/s each
    assert node.forward_s[row["zero3"]] == pytest.approx(6.4e-9)
    assert node.backward_s[row["zero3"]] == pytest.approx(12.8e-9)
    assert list(node.state_bytes[[row[k] for k in ("replicated", "zero1", "zero3", "sharded")]]) == [512, 384, 256, 256]


def test_a_gathered_parameter_takes_room_for_its_block_and_its_gradient() -> None:
    table = make(mlp_graph(8, (4, 8)), 2)
    node = node_of(table, "param:linear_0_weight")
    row = labels(node).index("zero3")
    # weight 128 B and bias 32 B gathered, and their gradients, beside the ops of the block or before them
    work = max(min(other.workspace_bytes) for other in table.nodes if other.kind == "op")
    assert node.workspace_bytes[row] == 128 + 32 + max(128 + 32, work)
    assert node.workspace_bytes[0] == 0


def test_small_gathered_parameters_of_a_block_share_one_latency() -> None:
    """1 us per collective: the shards of a weight and a bias are gathered together, those of 1 MiB and more alone."""
    slow = plain_cluster(intra_node=Link(1e10, 1e-6, 0.0, 0.0, 0.0))
    latency_s = collective_cost(slow, "all_gather", Group(2, 1)).latency_s
    assert latency_s > 0
    for width, collectives in ((8, 1), (2**20, 2)):
        graph = mlp_graph(8, (4, width))
        found = []
        for cluster in (slow, plain_cluster()):
            nodes = [node for node in make(graph, 2, cluster=cluster).nodes if node.kind == "param"]
            found.append(sum(float(node.forward_s[labels(node).index("zero3")]) for node in nodes))
        assert len(nodes) == 2
        assert found[0] - found[1] == pytest.approx(collectives * latency_s, rel=1e-6)


def test_edges_price_redistribution_of_the_local_value() -> None:
    table = make(mlp_graph(8, (4, 8, 4), bias=False), 2)
    at = {node.name: i for i, node in enumerate(table.nodes)}
    edge = next(e for e in table.edges if (e.source, e.target) == (at["relu_0"], at["linear_1"]))
    outs = [choice[0].outputs[0] for choice in table.nodes[edge.source].choices]
    ins = [choice[0].inputs[0] for choice in table.nodes[edge.target].choices]
    size = 8 * 8 * 4
    expected = {
        (shard(0), shard(0)): (0, 0),
        (INVARIANT, REPLICATE): (0, size),  # backward all_reduce
        (INVARIANT, shard(0)): (0, size / 2),  # backward all_gather
        (shard(0), INVARIANT): (size / 2, 0),  # all_gather
        (shard(0), REPLICATE): (size / 2, size / 2),  # all_gather and reduce_scatter
        (shard(1), shard(0)): (size / 4, size / 4),  # all_to_all of the local half, half of it leaves
    }
    for (source, target), (forward, backward) in expected.items():
        p, q = outs.index(source), ins.index(target)
        assert edge.forward_s[p, q] * 1e10 == pytest.approx(forward), (source, target)
        assert edge.backward_s[p, q] * 1e10 == pytest.approx(backward), (source, target)
    assert PARTIAL not in ins


def test_microbatches_divide_time_and_activations_but_not_state() -> None:
    one, two = make(TWO_OPS, 1), make(TWO_OPS, 1, microbatches=2)
    first, second = (node_of(t, "mse_loss") for t in (one, two))
    assert second.activation_bytes[0] == first.activation_bytes[0] / 2
    assert node_of(two, "param:linear_0_weight").state_bytes[0] == node_of(one, "param:linear_0_weight").state_bytes[0]
    assert node_of(two, "linear_0").forward_s[0] == pytest.approx((64 + 128 + 128) / 1e11)


def test_a_batch_that_does_not_divide_has_no_table() -> None:
    assert CostTables(TWO_OPS, plain_cluster()).table(stage_mesh(2), 3) is None
    assert CostTables(TWO_OPS, plain_cluster(), pins=Pins(dp=4)).table(stage_mesh(4), 4) is None


def test_blocks_of_a_class_share_nodes_and_name_every_occurrence() -> None:
    table = make(residual_graph(layers=3), 2, 2)
    up, hub = node_of(table, "up_0"), node_of(table, "hub:add_0")
    assert (up.blocks, up.names) == ((1, 2, 3), ("up_0", "up_1", "up_2"))
    assert (hub.blocks, hub.names) == ((1, 2), ("add_0", "add_1"))
    assert node_of(table, "param:up_0_weight").names == ("up_0_weight", "up_1_weight", "up_2_weight")
    crossing = {c.value: (c.producer_block, c.last_block) for c in table.crossings}
    assert crossing == {"embed": (0, 1), "add_0": (1, 2), "add_1": (2, 3), "add_2": (3, 4)}
    edge = next(e for e in table.edges if table.nodes[e.source] is hub and table.nodes[e.target] is up)
    assert edge.cut_pairs == ((1, 2), (2, 3))
    assert edge.blocks == (2, 3)


def test_every_concrete_edge_between_ops_is_listed_once() -> None:
    graph = residual_graph(layers=4)
    table = make(graph, 2, 2)
    listed = sorted(
        (table.nodes[e.source].kind, table.nodes[e.target].kind, *pair) for e in table.edges for pair in e.cut_pairs
    )
    # embed hub, 4 hubs less the last; each hub feeds up and add of the next block; add_3 feeds head directly
    assert listed.count(("hub", "op", 1, 2)) == 2
    assert sum(kind[:2] == ("hub", "op") for kind in listed) == 8
    assert sum(kind[:2] == ("op", "hub") for kind in listed) == 4
    assert ("op", "op", 4, 5) in listed


def test_pinned_data_axis_has_batch_strategies_alone() -> None:
    table = make(GRAPHS["attention"], 2, dp=2)
    for node in table.nodes:
        if node.kind == "op":
            assert len(node.choices) == 1
            assert node.choices[0][0].splits_work
        if node.kind == "param":
            assert set(labels(node)) == {"invariant", "replicated", "zero1", "zero3"}


def test_pinned_tensor_axis_splits_every_layer_but_never_the_batch() -> None:
    table = make(GRAPHS["attention"], 1, 2, dp=1, tp=2)
    for name in ("q", "k", "v", "out"):
        node = node_of(table, name)
        assert "replicate" not in labels(node, axis=1)
        assert all(choice[1].inputs[0] != shard(0) for choice in node.choices)


@pytest.mark.parametrize(("zero", "label"), [(0, "replicated"), (1, "zero1"), (3, "zero3")])
def test_zero_pin_decides_how_parameters_are_kept(zero: int, label: str) -> None:
    node = node_of(make(TWO_OPS, 2, dp=2, zero=zero), "param:linear_0_weight")
    assert set(labels(node)) - {"invariant"} == {label}


def test_a_price_that_is_no_number_names_the_op() -> None:
    broken = replace(TWO_OPS, ops=(replace(TWO_OPS.ops[0], flops_forward=float("nan")), *TWO_OPS.ops[1:]))
    with pytest.raises(InputError, match="linear_0"):
        make(broken, 2)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(GRAPHS)),
    sizes=st.sampled_from([(2,), (4,), (2, 2), (4, 2)]),
    factor=st.floats(1.0, 50.0),
    what=st.sampled_from(["intra_node", "inter_node", "memory_bytes_per_s", "peak_flops", "launch"]),
)
def test_faster_hardware_never_raises_any_entry(name: str, sizes: tuple[int, ...], factor: float, what: str) -> None:
    slow = plain_cluster(
        gpus_per_node=2,
        intra_node=Link(1e10, 1e-6, 1e-7, 1e-6, 1e-10),
        inter_node=Link(2e9, 3e-6, 2e-7, 2e-6, 3e-10),
        launch_overhead_s=1e-6,
    )
    spec = slow.spec
    changes: dict[str, dict[str, object]] = {
        "intra_node": {"intra_node": replace(spec.intra_node, bandwidth_bytes_per_s=1e10 * factor)},
        "inter_node": {"inter_node": replace(spec.inter_node, bandwidth_bytes_per_s=2e9 * factor)},
        "memory_bytes_per_s": {"memory_bytes_per_s": 1e11 * factor},
        "peak_flops": {"peak_flops": {"float32": 1e12 * factor}},
        "launch": {"launch_overhead_s": 1e-6 / factor},
    }
    fast = replace(slow, spec=replace(spec, **changes[what]))
    before, after = (make(GRAPHS[name], *sizes, cluster=cluster) for cluster in (slow, fast))
    for old, new in zip((*before.nodes, *before.edges), (*after.nodes, *after.edges), strict=True):
        for field in ("forward_s", "backward_s", "step_s", "microbatch_j"):
            if hasattr(old, field):
                assert np.all(getattr(new, field) <= getattr(old, field) * (1 + 1e-12) + 1e-18), field
    assert after.p2p_s_per_byte <= before.p2p_s_per_byte


@pytest.mark.parametrize("name", sorted(GRAPHS))
@pytest.mark.parametrize("sizes", [(), (1,), (2,), (2, 2), (4, 2), (1, 2)])
def test_whole_everywhere_is_always_allowed_and_every_array_fits(name: str, sizes: tuple[int, ...]) -> None:
    table = make(GRAPHS[name], *sizes)
    for node in table.nodes:
        assert len({str(c) for c in node.choices}) == len(node.choices)
        for field in ("forward_s", "backward_s", "step_s", "microbatch_j", "step_j", "state_bytes", "workspace_bytes"):
            array = getattr(node, field)
            assert array.shape == (len(node.choices),)
            assert np.all(np.isfinite(array) & (array >= 0))
    for edge in table.edges:
        shape = len(table.nodes[edge.source].choices), len(table.nodes[edge.target].choices)
        assert edge.forward_s.shape == edge.backward_s.shape == edge.microbatch_j.shape == shape
        assert edge.forward_s[0, 0] == 0
    assert chosen(table, decide(table, lambda node: 0)) == (0,) * len(table.nodes)
    assert sum(table.labels.values()) == sum(len(node.choices) for node in table.nodes)


def test_tables_are_the_same_every_time() -> None:
    first, second = (make(GRAPHS["residual"], 2, 2) for _ in range(2))
    for old, new in zip(first.nodes, second.nodes, strict=True):
        assert old.choices == new.choices
        assert old.forward_s.tobytes() == new.forward_s.tobytes()
