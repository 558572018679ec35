"""Predictions against the search's formula and bounds that must hold."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from autopar.cost import stages
from autopar.cost.hardware import load_cluster
from autopar.cost.predict import predict, timeline_of, transfers_s
from autopar.cost.stages import stage_costs
from autopar.cost.table import CostTables
from autopar.errors import PlanMismatchError
from autopar.ir.cost import CostTable
from autopar.ir.mesh import stage_mesh
from autopar.ir.pipeline import step_time_s
from autopar.ir.placement import shard
from autopar.ir.software import Software
from autopar.ir.solution import Decisions
from autopar.search.evaluate import Layout, evaluate
from tests.cost.decide import decide
from tests.cost.devices import plain_cluster
from tests.toy_graphs import attention_graph, mlp_graph, residual_graph

GRAPHS = {"mlp": mlp_graph(), "residual": residual_graph(layers=4), "attention": attention_graph()}


def random_choice(table: CostTable, seed: int) -> dict[int, int]:
    """A choice without forbidden pairs, found by trying."""
    generator = random.Random(seed)
    chosen: dict[int, int] = {}
    for index, node in enumerate(table.nodes):
        options = list(range(len(node.choices)))
        generator.shuffle(options)
        for option in options:
            chosen[index] = option
            if all(
                np.isfinite(edge.forward_s[chosen[edge.source], chosen[edge.target]])
                for edge in table.edges
                if edge.source in chosen and edge.target in chosen
            ):
                break
        else:
            return dict.fromkeys(range(len(table.nodes)), 0)
    return chosen


@pytest.mark.parametrize("name", sorted(GRAPHS))
@pytest.mark.parametrize("seed", range(6))
def test_stage_sums_are_those_that_the_search_minimises(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS[name]
    # what products keep in a form of their own follows from two choices, and is known after the search (test_copies)
    monkeypatch.setattr(stages, "copied_bytes", lambda *_: {})
    tables = CostTables(graph, plain_cluster(), software=Software(frees_gradients=False, copies_gradients=False))
    table = tables.table(stage_mesh(2, 2), 2)
    assert table is not None
    choice = random_choice(table, seed)
    position = {id(node): i for i, node in enumerate(table.nodes)}
    cuts = (len(graph.blocks) // 2,) if seed % 2 else ()
    recompute = "full" if seed % 3 == 0 else "none"
    decisions = decide(table, lambda node: choice[position[id(node)]], cuts, recompute=recompute)
    layout = Layout(len(graph.blocks), (0, *cuts), (recompute == "full",) * (len(cuts) + 1))
    figures = evaluate(table, tables.device, layout, [choice[i] for i in range(len(table.nodes))])
    costs = stage_costs(tables, table, decisions)
    sends = (0.0, *transfers_s(tables, costs, decisions))
    whole = [c.forward_s + c.backward_s + 2 * send for c, send in zip(costs, sends, strict=True)]
    assert whole == pytest.approx(figures.stage_s)
    formula = step_time_s(whole, [c.step_s for c in costs], 2)
    assert formula == pytest.approx(figures.time_s)
    predicted = predict(tables, decisions)
    # beside the formula: what comes over a cut for the next microbatch, what goes back, and the copies that came
    crossing = [2 * cost.received_bytes * (k > 0) + (len(costs) - k) * cost.held_bytes for k, cost in enumerate(costs)]
    found = [q.value - beside for q, beside in zip(predicted.peak_memory_bytes, crossing, strict=True)]
    assert found == pytest.approx(figures.memory_bytes)
    dynamic = figures.energy_j - figures.time_s * (50.0 * decisions.num_gpus + 200.0)
    assert predicted.energy_by_cause["dynamic"] == pytest.approx(dynamic)
    if not cuts:
        assert predicted.step_time_s.value == pytest.approx(figures.time_s)
    else:
        assert 0.5 * figures.time_s <= predicted.step_time_s.value <= 1.5 * figures.time_s


def whole_plan(tables: CostTables, microbatches: int = 2, cuts: tuple[int, ...] = (3,), **options: str) -> Decisions:
    table = tables.table(stage_mesh(2), microbatches)
    assert table is not None
    return decide(table, lambda node: 0, cuts, **options)


def test_energy_and_power_are_consistent() -> None:
    tables = CostTables(GRAPHS["residual"], plain_cluster(gpus_per_node=2))
    predicted = predict(tables, whole_plan(tables))
    assert predicted.energy_j.value == pytest.approx(sum(predicted.energy_by_cause.values()))
    assert predicted.average_power_w.value * predicted.step_time_s.value == pytest.approx(predicted.energy_j.value)
    assert predicted.peak_power_w.value >= predicted.average_power_w.value
    assert predicted.energy_by_cause["host"] == pytest.approx(2 * 200 * predicted.step_time_s.value)
    assert predicted.energy_by_cause["dynamic"] <= 4 * 100 * predicted.step_time_s.value
    assert predicted.tdp_energy_j == pytest.approx(4 * 150 * predicted.step_time_s.value)


def test_waiting_for_the_pace_costs_fixed_power_alone() -> None:
    tables = CostTables(GRAPHS["residual"], plain_cluster())
    plan = whole_plan(tables)
    free = predict(tables, plan)
    paced = predict(tables, replace(plan, pace_s=3 * free.step_time_s.value))
    assert paced.step_time_s.value == 3 * free.step_time_s.value
    waited_s = 2 * free.step_time_s.value
    assert paced.energy_j.value - free.energy_j.value == pytest.approx((4 * 50 + 200) * waited_s)
    assert paced.average_power_w.value < free.average_power_w.value
    assert paced.peak_power_w.value == free.peak_power_w.value
    assert predict(tables, replace(plan, pace_s=0.5 * free.step_time_s.value)) == free


def test_each_stage_is_priced_at_its_own_clock() -> None:
    tables = CostTables(GRAPHS["residual"], load_cluster("h100-sxm-80gb", 4))
    plan, slow = whole_plan(tables), tables.clocks_hz[-1]
    first = replace(plan, stages=(replace(plan.stages[0], clock_hz=slow), plan.stages[1]))
    both = replace(plan, stages=tuple(replace(stage, clock_hz=slow) for stage in plan.stages))
    free, mixed, locked = (predict(tables, decisions) for decisions in (plan, first, both))
    assert (mixed.stages[0], mixed.stages[1]) == (locked.stages[0], free.stages[1])
    assert locked.stages[0].forward_s.value > free.stages[0].forward_s.value
    assert locked.energy_by_cause["dynamic"] < mixed.energy_by_cause["dynamic"] < free.energy_by_cause["dynamic"]
    with pytest.raises(PlanMismatchError, match="clocks"):
        predict(tables, replace(plan, stages=tuple(replace(stage, clock_hz=7.0) for stage in plan.stages)))


def test_every_figure_is_labelled_and_bracketed() -> None:
    tables = CostTables(GRAPHS["residual"], plain_cluster())
    predicted = predict(tables, whole_plan(tables))
    for quantity in (predicted.step_time_s, predicted.energy_j, *predicted.peak_memory_bytes):
        assert quantity.label == "modelled"
        assert quantity.low < quantity.value < quantity.high


def test_full_recompute_costs_time_and_energy_and_saves_activations() -> None:
    tables = CostTables(GRAPHS["residual"], plain_cluster())
    kept = predict(tables, whole_plan(tables, microbatches=4))
    redone = predict(tables, whole_plan(tables, microbatches=4, recompute="full"))
    assert redone.step_time_s.value > kept.step_time_s.value
    assert redone.energy_by_cause["dynamic"] > kept.energy_by_cause["dynamic"]
    assert redone.stages[0].forward_s.value == kept.stages[0].forward_s.value


def test_gpipe_keeps_more_activations_than_1f1b() -> None:
    tables = CostTables(GRAPHS["residual"], plain_cluster(), software=Software(frees_gradients=False))
    first, second = (
        predict(tables, whole_plan(tables, microbatches=8, schedule=schedule)).stages[1].memory_by_cause
        for schedule in ("gpipe", "1f1b")
    )
    assert first["activations"] == pytest.approx(8 * second["activations"])


def test_a_hop_between_nodes_is_slower_than_one_inside() -> None:
    slow = plain_cluster().spec.inter_node
    near, far = (
        CostTables(
            GRAPHS["residual"],
            plain_cluster(gpus_per_node=n, inter_node=replace(slow, bandwidth_bytes_per_s=1e9)),
        )
        for n in (8, 2)
    )
    assert predict(far, whole_plan(far)).step_time_s.value > predict(near, whole_plan(near)).step_time_s.value


def test_a_timeline_has_every_action() -> None:
    tables = CostTables(GRAPHS["residual"], plain_cluster())
    decisions = whole_plan(tables, microbatches=4)
    table = tables.table(decisions.mesh, 4)
    assert table is not None
    timeline = timeline_of(tables, stage_costs(tables, table, decisions), decisions)
    assert [len(stage) for stage in timeline.stages] == [9, 9]


def test_inference_has_no_gradients_optimizer_or_backward() -> None:
    graph = GRAPHS["residual"]
    graph = replace(graph, ops=tuple(replace(op, saved=()) for op in graph.ops))  # as captured for inference
    tables = CostTables(graph, plain_cluster(), training=False)
    stage = predict(tables, whole_plan(tables, cuts=())).stages[0]
    assert (stage.backward_s.value, stage.step_s.value) == (0, 0)
    assert {k: stage.memory_by_cause[k] for k in ("gradients", "optimizer", "activations")} == dict.fromkeys(
        ("gradients", "optimizer", "activations"), 0.0
    )


def test_decisions_of_another_mesh_are_refused() -> None:
    tables = CostTables(GRAPHS["mlp"], plain_cluster())
    decisions = whole_plan(tables, cuts=())
    with pytest.raises(PlanMismatchError, match="linear_0"):
        predict(tables, replace(decisions, mesh=stage_mesh(2, 2)))
    with pytest.raises(PlanMismatchError, match="microbatches"):
        predict(tables, replace(decisions, num_microbatches=3))
    strange = {**decisions.parameters, "linear_0_weight": decisions.parameters["linear_0_weight"][:0]}
    with pytest.raises(PlanMismatchError, match="linear_0_weight"):
        predict(tables, replace(decisions, parameters=strange))


def test_hubs_take_what_producers_make_and_consumers_accept() -> None:
    table = CostTables(GRAPHS["residual"], plain_cluster()).table(stage_mesh(2), 1)
    assert table is not None
    hub = next(node for node in table.nodes if node.name == "hub:add_0")
    kinds = {str(sharding[0]) for sharding in hub.choices}
    assert {"I", "R", "S0", "S1", "P"} == kinds
    assert hub.choices[0] == (hub.choices[0][0],)
    assert (shard(0),) in hub.choices
