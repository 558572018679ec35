"""Experts split over ranks: the region of a captured mixture of experts against itself, value and gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.cost.collective import collective_cost
from autopar.cost.hardware import load_cluster
from autopar.cost.table import CostTables
from autopar.ir.graph import Op, OpGraph, Value
from autopar.ir.mesh import stage_mesh
from autopar.ir.placement import PARTIAL, REPLICATE, shard
from autopar.ir.strategy import Strategy
from autopar.rewrite.region import experts_module
from autopar.rules.experts import exchanged_values, expert_ids, moe_experts, num_experts
from autopar.rules.strategies import axis_strategies, local_metas
from tests.capture.interpreter import run_op
from tests.rules.test_strategies import check_op

SMALL = {"layers": "1", "hidden": "8", "heads": "2", "kv_heads": "2", "ffn": "12", "experts": "8", "seq": "4",
         "vocab": "16", "batch": "4", "dtype": "float32"}  # fmt: skip
EXPERTS, PAIRS = 8, 32


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return capture(load_source("examples/mixtral.py", SMALL), dtype="float64").graph


@pytest.fixture(scope="module")
def region(graph: OpGraph) -> Op:
    (op,) = [op for op in graph.ops if op.target == "autopar.moe_experts"]
    return op


def operands(region: Op, values: dict[str, Value], choose: str) -> list[torch.Tensor]:
    """Random operands; the experts of the pairs are drawn from all, or are a single one."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(values[n].meta.shape, generator=generator, dtype=torch.float64) - 0.5 for n in region.inputs]
    ids = torch.randint(EXPERTS, (PAIRS,), generator=generator)
    tensors[expert_ids(region)] = ids if choose == "all" else torch.full_like(ids, 5)
    return tensors


def run_members(region: Op, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    env = dict(zip(region.inputs, tensors, strict=True))
    run_op(region, env)
    return [env[name] for name in region.outputs]


def sent_bytes(region: Op, graph: OpGraph) -> int:
    return sum(graph.values[name].meta.num_bytes * times for name, times in exchanged_values(region, graph.values))


def strategies(region: Op, graph: OpGraph, sizes: tuple[int, ...]) -> list[Strategy]:
    """All that need no communication inside."""
    options = [s for s in axis_strategies(region, graph.values) if s.label != "exchange"]
    combined = itertools.product(options, repeat=len(sizes))
    return [s for s in combined if local_metas(region, s, sizes, graph.values) is not None]


@pytest.mark.parametrize("choose", ["all", "one"])
@pytest.mark.parametrize("sizes", [(2,), (4,), (8,), (2, 2)])
def test_a_region_split_by_token_or_by_expert_is_the_whole_one(
    graph: OpGraph, region: Op, sizes: tuple[int, ...], choose: str
) -> None:
    """With `one`, every rank but one gets no pair at all."""
    values = dict(graph.values)
    checked = 0
    for strategy in strategies(region, graph, sizes):
        if not any(axis.label == "experts" for axis in strategy):
            continue
        ranks = math.prod(n for n, axis in zip(sizes, strategy, strict=True) if axis.label == "experts")
        core = experts_module(region, EXPERTS // ranks, "cpu")
        check_op(region, values, operands(region, values, choose), strategy, sizes,
                 lambda wholes: run_members(region, wholes), core)  # fmt: skip
        checked += 1
    assert checked == (1 if len(sizes) == 1 else 5)


def test_experts_split_their_weights_and_nothing_else(graph: OpGraph, region: Op) -> None:
    tokens, experts, exchange = moe_experts(region, graph.values)
    is_weight = [graph.values[name].origin == "parameter" for name in region.inputs]
    assert sum(is_weight) == 2
    for strategy, weight in ((tokens, REPLICATE), (experts, shard(0)), (exchange, shard(0))):
        assert {p for p, w in zip(strategy.inputs, is_weight, strict=True) if w} == {weight}
    assert experts.outputs == (PARTIAL,)
    assert {p for p, w in zip(exchange.inputs, is_weight, strict=True) if not w} == {shard(0)}
    assert exchange.outputs == (shard(0),)


def test_an_exchange_sends_every_pair_there_and_back(graph: OpGraph, region: Op) -> None:
    """Per pair: a row of 8 float64, its weight and its id, 8 bytes each; back a row of 8."""
    assert num_experts(region, graph.values) == EXPERTS
    assert sent_bytes(region, graph) == PAIRS * 8 * (8 + 1 + 1 + 8)


def test_an_exchange_is_priced_as_two_all_to_alls_each_way(graph: OpGraph, region: Op) -> None:
    cluster, mesh = load_cluster("h100-sxm-80gb", 4), stage_mesh(4)
    table = CostTables(graph, cluster).table(mesh, 1)
    assert table is not None
    node = next(n for n in table.nodes if n.name == region.name)
    at = {choice[0].label: i for i, choice in enumerate(node.choices)}
    one = collective_cost(cluster, "all_to_all", mesh.group(0))
    moved_s = 2 * one.latency_s + sent_bytes(region, graph) / 4 * one.s_per_byte
    for times_s in (node.forward_s, node.backward_s):
        assert times_s[at["exchange"]] - moved_s <= times_s[at["tokens"]]
        assert times_s[at["exchange"]] > moved_s
    weights = [n for n in table.nodes if n.kind == "param" and "experts" in n.name]
    for weight in weights:
        stored = {choice[0].label: weight.state_bytes[i] for i, choice in enumerate(weight.choices)}
        assert stored["sharded"] * 4 == stored["invariant"]
