"""Memory by cause: closed forms of states and schedules, the search's formula, and bounds between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopar.cost.footprint import MEMORY_CAUSES, memory_by_cause, memory_timeline
from autopar.cost.memory import ALLOCATOR_SLACK, BUCKET_BYTES, Synced, synced
from autopar.cost.predict import predict, timeline_of
from autopar.cost.software import load_software, software_stacks
from autopar.cost.stages import BlockBytes, StageCost, stage_costs
from autopar.cost.table import CostTables
from autopar.ir.mesh import stage_mesh
from autopar.ir.software import Software
from autopar.ir.solution import Decisions, StageChoice
from autopar.search.evaluate import Layout, evaluate
from tests.cost.decide import by_label, decide, first_finite
from tests.cost.devices import plain_cluster
from tests.cost.test_recompute import GRAPH
from tests.toy_graphs import mlp_graph, residual_graph


@pytest.mark.parametrize(
    ("stack", "zero0", "zero1", "zero3"),
    [
        # bytes per element of bf16 parameters with AdamW, on two devices: states and master copies cut by ZeRO 1,
        # everything by ZeRO 3
        ("autopar", 2 + 2 + 4, 2 + 2 + 2, 4),
        ("megatron", 2 + 4 + 12, 2 + 4 + 6, 9),
        ("torchtitan", 4 + 12, 4 + 6, 8),
    ],
)
def test_state_follows_zero_and_precision(stack: str, zero0: float, zero1: float, zero3: float) -> None:
    graph = mlp_graph(8, (4, 8), dtype="bfloat16")
    tables = CostTables(graph, plain_cluster(), software=load_software(stack))
    table = tables.table(stage_mesh(2), 2)
    assert table is not None
    weight = next(node for node in table.nodes if node.name == "param:linear_0_weight")
    found = {c[0].label: size / 32 for c, size in zip(weight.choices, weight.state_bytes.tolist(), strict=True)}
    assert (found["replicated"], found["zero1"], found["zero3"]) == (zero0, zero1, zero3)


def stage(activations: float, state: float = 0.0, workspace: float = 0.0, boundary: float = 1.0) -> StageCost:
    cost = StageCost(activation_bytes=activations, boundary_bytes=boundary, largest_block_bytes=activations)
    cost.workspace_bytes = cost.op_workspace_bytes = workspace
    cost.state["parameters"] = state
    return cost


def pipeline(
    count: int, microbatches: int, *, interleave: int = 1, schedule: str = "1f1b", recompute: str = "none"
) -> Decisions:
    stages = tuple(StageChoice(i, i + 1, recompute) for i in range(count))
    return Decisions(stage_mesh(1), microbatches, schedule, stages, {}, {}, {}, interleave=interleave)


def test_first_ranks_hold_what_published_forms_say() -> None:
    """1F1B: one set per rank behind it; interleaved: L (1 + (p - 1) / (p m)) layers (Korthikanti et al. 2022)."""
    ranks, chunks, layers = 8, 3, 96
    each = layers / ranks / chunks
    costs = [stage(each, state=2.0, workspace=5.0) for _ in range(ranks * chunks)]
    found = memory_by_cause(costs, 0, pipeline(ranks * chunks, 64, interleave=chunks), Software())
    assert found["activations"] == pytest.approx(layers * (1 + (ranks - 1) / (ranks * chunks)))
    assert (found["parameters"], found["workspace"]) == (2.0 * chunks, 5.0)
    plain = [stage(layers / ranks) for _ in range(ranks)]
    held = [memory_by_cause(plain, k, pipeline(ranks, 64), Software())["activations"] for k in range(ranks)]
    assert held == [layers / ranks * (ranks - k) for k in range(ranks)]
    assert memory_by_cause(plain, 7, pipeline(ranks, 64, schedule="gpipe"), Software())["activations"] == 64 * 12
    full = memory_by_cause(plain, 0, pipeline(ranks, 64, recompute="full"), Software())
    assert full["activations"] == ranks * 1.0 + layers / ranks


def test_gradients_come_while_activations_go() -> None:
    """Two blocks of 60 and 40 bytes kept, 10 and 100 of gradients, 5 and 30 at work; other state 1000."""
    cost = stage(100.0, state=1000.0, workspace=30.0)
    cost.state["gradients"] = 110.0
    cost.memory = {
        0: BlockBytes(60.0, gradients=10.0, workspace=5.0),
        1: BlockBytes(40.0, gradients=100.0, workspace=30.0),
    }
    frees, keeps = Software(frees_gradients=True), Software(frees_gradients=False)

    def peak(microbatches: int, software: Software) -> float:
        return sum(memory_by_cause([cost], 0, pipeline(1, microbatches, schedule="gpipe"), software).values())

    assert peak(1, keeps) == 1000 + 110 + 100 + 30
    # last block: all kept, its gradients, its work; first block: 60 kept, all gradients, its work
    assert peak(1, frees) == 1000 + max(100 + 100 + 30, 110 + 60 + 5)
    # the second backward of two starts with everything but one microbatch
    assert peak(2, frees) == 1000 + max(200 + 100 + 30, 110 + 160 + 5, 110 + 100 + 30)
    assert sum(memory_by_cause([cost], 0, pipeline(1, 2), frees).values()) == peak(1, keeps)


def test_full_recompute_gives_boundaries_back_block_by_block() -> None:
    """Three blocks of 50 bytes, of which 4 leave the first two, 20 bytes of gradients each, 8 at work."""
    cost = stage(150.0, workspace=8.0, boundary=8.0)
    cost.largest_block_bytes = 50.0
    cost.state["gradients"] = 60.0
    cost.memory = {k: BlockBytes(50.0, 4.0 * (k < 2), 20.0, 8.0) for k in range(3)}
    found = sum(memory_by_cause([cost], 0, pipeline(1, 1, recompute="full"), Software()).values())
    # whatever the block, one is there again; the first has all gradients and no boundary left
    assert found == max(20 + 8 + 50 + 8, 40 + 4 + 50 + 8, 60 + 50 + 8)


def test_a_bucket_is_copied_once_all_of_it_is_made() -> None:
    """One block of 1.6 buckets of gradients, summed beside backward."""
    size = float(BUCKET_BYTES)
    cost = stage(4.0 * size)
    cost.state["gradients"] = 1.6 * size
    cost.synced, cost.bucket_limit_bytes = Synced(summed=1.6 * size), 1e12
    for activations, expected in ((4.0, 1.6 + 4.0), (1.0, 1.0 + (1 - 1 / 1.6) + 1.0)):
        # the first bucket is full when 1 / 1.6 of the block is done
        cost.activation_bytes = cost.largest_block_bytes = activations * size
        cost.memory = {0: BlockBytes(activations * size, gradients=1.6 * size)}
        found = memory_by_cause([cost], 0, pipeline(1, 1), Software(overlap_gradients=True))
        assert sum(found.values()) == pytest.approx(max(expected, 1.6 + activations) * size)


def test_stages_behind_a_cut_hold_what_comes_and_what_goes_back() -> None:
    costs = [stage(10.0) for _ in range(2)]
    costs[1].received_bytes = 3.0
    for microbatches, buffers in ((1, 0.0), (2, 6.0)):
        found = [memory_by_cause(costs, k, pipeline(2, microbatches), Software()) for k in range(2)]
        assert [causes.get("buffers", 0.0) for causes in found] == [0.0, buffers]
    costs.append(stage(10.0))
    costs[2].received_bytes = 5.0  # whose gradient comes to the stage before
    found = [memory_by_cause(costs, k, pipeline(3, 4), Software()) for k in range(3)]
    assert [causes.get("buffers", 0.0) for causes in found] == [0.0, 2 * 3.0 + 5.0, 2 * 5.0]


def test_copies_on_both_sides_of_a_cut_live_with_their_microbatch() -> None:
    costs = [stage(10.0) for _ in range(3)]
    costs[1].held_bytes, costs[0].sent_bytes, costs[1].sent_bytes = 4.0, 2.0, 1.0
    for keeps, kept in ((True, [12.0, 15.0, 10.0]), (False, [10.0, 14.0, 10.0])):
        found = [memory_by_cause(costs, k, pipeline(3, 4), Software(keeps_sent=keeps)) for k in range(3)]
        assert [causes["activations"] for causes in found] == [(3 - k) * size for k, size in enumerate(kept)]


@pytest.mark.parametrize("stack", sorted(software_stacks()))
@pytest.mark.parametrize("keep", ["none", "selective", "selective-op", "alternate"])
@pytest.mark.parametrize(("recompute", "cuts"), [("none", ()), ("none", (3,)), ("full", (2,))])
def test_predictions_never_exceed_what_the_search_reckons_with_but_for_copies_at_cuts(
    stack: str, keep: str, recompute: str, cuts: tuple[int, ...]
) -> None:
    software = load_software(stack)
    tables = CostTables(GRAPH, plain_cluster(), software=software, keep=keep)
    table = tables.table(stage_mesh(2), 1)
    assert table is not None
    for pick in (first_finite(table), by_label("batch", "zero3")):
        decisions = decide(table, pick, cuts, recompute=recompute)
        choice = [pick(node) for node in table.nodes]
        layout = Layout(table.num_blocks, (0, *cuts), (recompute == "full",) * (len(cuts) + 1))
        figures = evaluate(table, tables.device, layout, choice)
        costs = stage_costs(tables, table, decisions)
        for k, reckoned in enumerate(figures.memory_bytes):
            causes = memory_by_cause(costs, k, decisions, software)
            assert set(causes) <= set(MEMORY_CAUSES)
            assert all(size >= 0 for size in causes.values())
            formula = reckoned + costs[k].held_bytes + (costs[k].sent_bytes if software.keeps_sent else 0.0)
            if not software.frees_gradients and not software.copies_gradients:
                assert sum(causes.values()) == pytest.approx(formula)
            beyond = max(0.0, costs[k].bucket_limit_bytes - costs[k].workspace_bytes)
            assert formula - beyond - costs[k].state["gradients"] <= sum(causes.values()) * (1 + 1e-9)
            assert sum(causes.values()) <= formula * (1 + 1e-9)


def test_what_moves_has_slack_where_reserved_memory_is_metered() -> None:
    causes = []
    for meter in ("allocated", "reserved"):
        tables = CostTables(residual_graph(layers=4), plain_cluster(), software=Software(meter=meter))
        table = tables.table(stage_mesh(2), 2)
        assert table is not None
        causes.append(dict(predict(tables, decide(table, first_finite(table))).stages[0].memory_by_cause))
    slack = causes[1].pop("slack")
    assert causes[1] == pytest.approx(causes[0])
    assert slack == pytest.approx(ALLOCATOR_SLACK * (causes[0]["activations"] + causes[0]["workspace"]))


def test_gathered_parameters_take_room_beside_the_ops_of_their_block() -> None:
    tables = CostTables(residual_graph(layers=4), plain_cluster(), software=Software(prefetch_parameters=True))
    table = tables.table(stage_mesh(2), 1)
    assert table is not None
    costs = stage_costs(tables, table, decide(table, by_label("batch", "zero3")))
    # two layers of 8 x 32 and 32 x 8 floats, the one at work and the next, and the gradients of one; what its ops need
    # at the least: of 4 rows and 8 columns, the largest is the add's or the first product's
    work = max(min(n.workspace_bytes.tolist()) for n in table.nodes if n.kind == "op" and n.blocks == (1, 2, 3, 4))
    assert costs[0].workspace_bytes == pytest.approx(3 * 2048 + work)
    found = memory_by_cause(costs, 0, decide(table, by_label("batch", "zero3")), tables.software)
    assert found["buffers"] == costs[0].workspace_bytes - found["workspace"] > 0


def test_the_timeline_starts_and_ends_with_the_state_and_reaches_what_is_kept() -> None:
    tables = CostTables(residual_graph(layers=4), plain_cluster())
    table = tables.table(stage_mesh(2), 4)
    assert table is not None
    decisions = decide(table, first_finite(table), (3,))
    costs = stage_costs(tables, table, decisions)
    timeline = timeline_of(tables, costs, decisions)
    for k, cost in enumerate(costs):
        moments = memory_timeline(costs, k, decisions, timeline)
        causes = memory_by_cause(costs, k, decisions, tables.software)
        state = sum(cost.state.values())
        assert moments[0] == (0.0, state)
        assert moments[-1][1] == pytest.approx(state)
        assert max(size for _, size in moments) == pytest.approx(state + causes["activations"])
        assert [at for at, _ in moments] == sorted(at for at, _ in moments)


def test_a_loss_has_two_gradients_of_its_operand_at_work() -> None:
    """The zero-filled gradient of the log-probabilities, and that of the logits, beside what forward saved."""
    graph = mlp_graph(8, (4, 8))
    ops = tuple(
        replace(op, target="aten.cross_entropy_loss.default") if op.name == "mse_loss" else op for op in graph.ops
    )
    work = []
    for one in (graph, replace(graph, ops=ops)):
        table = CostTables(one, plain_cluster()).table(stage_mesh(1), 1)
        assert table is not None
        work.append(next(float(n.workspace_bytes[0]) for n in table.nodes if n.name == "mse_loss"))
    assert work[1] - work[0] == 8 * 8 * 4


def synced_stage(summed: float = 0.0, scattered: float = 0.0, largest: float = 0.0) -> StageCost:
    cost = stage(10.0, workspace=4.0)
    cost.state["gradients"] = summed + scattered
    cost.synced = Synced(summed, scattered, largest, scattered / 2)
    cost.bucket_limit_bytes = 1e9
    return cost


@pytest.mark.parametrize(
    ("cost", "bucket"),
    [
        (synced_stage(summed=1000.0), 1000.0),
        (synced_stage(summed=4.0 * BUCKET_BYTES), BUCKET_BYTES),
        (synced_stage(scattered=1000.0, largest=400.0), 1000.0),
        (synced_stage(scattered=4.0 * BUCKET_BYTES, largest=2.0 * BUCKET_BYTES), 2 * BUCKET_BYTES),
    ],
)
def test_gradients_are_copied_into_buckets_and_parts_gathered_after_backward(cost: StageCost, bucket: float) -> None:
    found = memory_by_cause([cost], 0, pipeline(1, 8), Software())
    assert (found["activations"], found["workspace"], found["buffers"]) == (0.0, 0.0, bucket)


def test_a_gradient_larger_than_a_bucket_is_summed_where_it_lies() -> None:
    yes, no = np.bool_(True), np.bool_(False)
    for size, room in ((BUCKET_BYTES - 1.0, BUCKET_BYTES - 1.0), (2.0 * BUCKET_BYTES, 0.0)):
        assert synced(size, yes, no, 1, Software()).room == room
    assert synced(2.0 * BUCKET_BYTES, no, yes, 4, Software()).room == 2 * BUCKET_BYTES
    assert synced(100.0, yes, no, 1, Software(copies_gradients=False)).room == 0.0


def test_zero_bubble_holds_what_weights_wait_for() -> None:
    """Rank k of K: K - k microbatches whole, or K - k - 1 with k whose W is put off."""
    ranks = 4
    costs = [stage(10.0, boundary=1.0) for _ in range(ranks)]
    for cost in costs:
        cost.waiting = {"x": 3.0, "gradient of y": 1.0}
    plan = pipeline(ranks, 8, schedule="zero-bubble")
    held = [memory_by_cause(costs, k, plan, Software(keeps_sent=False))["activations"] for k in range(ranks)]
    assert held == [10.0 * (ranks - k) + 4.0 * k for k in range(ranks)]


def test_interleaved_pipelines_keep_what_they_sent() -> None:
    costs = [stage(10.0) for _ in range(4)]
    for k, cost in enumerate(costs):
        cost.received_bytes = 3.0 * (k > 0)
    plan = pipeline(4, 8, interleave=2)
    with_, without = (memory_by_cause(costs, 0, plan, Software(keeps_sent=kept)) for kept in (True, False))
    # rank 0 has chunks 0 and 2: both send values on, chunk 2 sends gradients back
    assert with_["buffers"] - without.get("buffers", 0.0) == 8 * 3 * 3.0
