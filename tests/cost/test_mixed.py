"""Predictions on mixed clusters against the search's formula, and what a description means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.mixed import MixedCluster, describe_cluster, mixed_tables
from autopar.cost.predict import predict, stage_tables, transfers_s
from autopar.cost.stages import stage_costs
from autopar.errors import InputError, PlanMismatchError
from autopar.ir.cluster import ClusterDescription, GroupDescription, LinkDescription
from autopar.ir.pipeline import step_time_s
from autopar.ir.solution import Objective, Pins
from autopar.search.solve import search
from tests.toy_graphs import residual_graph

GROUPS = (GroupDescription("h100-sxm-80gb", (2,)), GroupDescription("a100-sxm-80gb", (2, 1), 10**9))


def cluster_of(link: LinkDescription | None = None) -> MixedCluster:
    cluster = describe_cluster(ClusterDescription(GROUPS, link))
    assert isinstance(cluster, MixedCluster)
    return cluster


@pytest.mark.parametrize("pp", [2, 3])
def test_prediction_is_what_the_search_minimised(pp: int) -> None:
    tables = mixed_tables(residual_graph(layers=4), cluster_of(), Pins(pp=pp))
    solution = search(tables, Objective("time"), pins=Pins(pp=pp), use_all=False)
    decisions = solution.decisions
    each = stage_tables(tables, decisions)
    assert {own.cluster.gpu for own in each} == {stage.gpu for stage in decisions.stages}
    costs = []
    for k, own in enumerate(each):
        table = own.table(decisions.mesh, decisions.num_microbatches)
        assert table is not None
        costs.append(stage_costs(own, table, decisions)[k])
    sends = (0.0, *transfers_s(tables, costs, decisions))
    whole = [c.forward_s + c.backward_s + 2 * send for c, send in zip(costs, sends, strict=True)]
    formula = step_time_s(whole, [c.step_s for c in costs], decisions.num_microbatches)
    assert formula == pytest.approx(solution.time_s, rel=1e-9)
    predicted = predict(tables, decisions)
    fixed_w = (solution.energy_j - predicted.energy_by_cause["dynamic"]) / solution.time_s
    own_w = (predicted.energy_by_cause["blocked"] + predicted.energy_by_cause["host"]) / predicted.step_time_s.value
    assert own_w == pytest.approx(fixed_w)
    with pytest.raises(PlanMismatchError, match="l40s"):
        predict(tables, replace(decisions, stages=tuple(replace(stage, gpu="l40s") for stage in decisions.stages)))


def test_description_sets_nodes_memory_and_link() -> None:
    cluster = cluster_of()
    assert [part.num_gpus for part in cluster.parts] == [2, 3]
    assert [part.gpus_per_node for part in cluster.parts] == [2, 1]
    assert cluster.part("a100-sxm-80gb").memory_bytes == 10**9
    slower = max(1 / part.network_share_bytes_per_s for part in cluster.parts)
    assert cluster.links[0, 1].s_per_byte == slower == cluster.links[1, 0].s_per_byte
    own = cluster_of(LinkDescription(4e9, 5e-6)).links[0, 1]
    assert (own.s_per_byte, own.latency_s) == (2 / 4e9, 5e-6)
    assert cluster_of(LinkDescription(4e9, 5e-6)).input_hash != cluster.input_hash


def test_one_group_is_a_plain_cluster_and_one_type_has_one_group() -> None:
    assert describe_cluster(ClusterDescription(GROUPS[:1])).gpu == "h100-sxm-80gb"
    with pytest.raises(InputError, match="2 groups"):
        describe_cluster(ClusterDescription((GROUPS[0], GROUPS[0])))
    with pytest.raises(InputError, match="unknown GPU"):
        describe_cluster(ClusterDescription((GroupDescription("h1000", (1,)),)))
