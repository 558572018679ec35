"""Recompute policies: bytes that stay and work that runs again, counted by hand on a small decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.predict import predict
from autopar.cost.recompute import recomputed
from autopar.cost.table import CostTables
from autopar.ir.cost import CostTable
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.solution import KEPT
from tests.cost.decide import decide, first_finite
from tests.cost.devices import plain_cluster
from tests.toy_graphs import GraphBuilder

BATCH, LENGTH, WIDTH, LAYERS = 2, 8, 16, 3
U = 4 * BATCH * LENGTH * WIDTH
"""Bytes of one activation of the residual stream."""
S = 4 * BATCH * LENGTH * LENGTH
"""Bytes of the scores."""


def decoder_graph() -> OpGraph:
    """Layers of unfused attention with one head, and a GELU MLP; each saves what autograd would."""
    build, shape, scores = GraphBuilder(BATCH), (BATCH, LENGTH, WIDTH), (BATCH, LENGTH, LENGTH)
    x = build.outside("x", shape, "input", batch_dim=0)
    target = build.outside("target", shape, "input", batch_dim=0)
    build.block("embed")
    x = build.linear("embed", x, WIDTH, bias=False)
    for i in range(LAYERS):
        build.block("layer")
        normed = norm(build, f"norm_{i}", x)
        q = build.linear(f"q_{i}", normed, WIDTH, bias=False)
        k, v = (replace_saved(build, build.linear(f"{name}_{i}", normed, WIDTH, bias=False)) for name in "kv")
        turned = build.op(f"turn_{i}", "aten.transpose.int", [k], (BATCH, WIDTH, LENGTH), constants=(1, 2), view_of=k)
        products = {"flops_forward": 2 * BATCH * LENGTH**2 * WIDTH, "flops_backward": 4 * BATCH * LENGTH**2 * WIDTH}
        s = build.op(f"scores_{i}", "aten.matmul.default", [q, turned], scores, saved=(q, turned), **products)
        p = build.op(f"softmax_{i}", "aten.softmax.int", [s], scores, constants=(-1,), saved=(f"softmax_{i}",))
        c = build.op(f"context_{i}", "aten.matmul.default", [p, v], shape, saved=(v,), **products)
        y = build.op(f"first_{i}", "aten.add.Tensor", [x, build.linear(f"out_{i}", c, WIDTH, bias=False)], shape)
        up = build.linear(f"up_{i}", norm(build, f"second_norm_{i}", y), 4 * WIDTH, bias=False)
        wide = build.op(f"gelu_{i}", "aten.gelu.default", [up], (BATCH, LENGTH, 4 * WIDTH), saved=(up,))
        x = build.op(f"last_{i}", "aten.add.Tensor", [y, build.linear(f"down_{i}", wide, WIDTH, bias=False)], shape)
    build.block("head")
    loss = build.op("mse_loss", "aten.mse_loss.default", [x, target], (), saved=(x, target))
    return build.graph(loss)


def norm(build: GraphBuilder, name: str, x: str) -> str:
    weight = build.outside(f"{name}_weight", (WIDTH,), "parameter")
    return build.op(
        name, "aten.layer_norm.default", [x, weight], build.values[x].meta.shape, constants=((WIDTH,),), saved=(x,)
    )


def replace_saved(build: GraphBuilder, name: str) -> str:
    """The operand of the last linear is listed with an op before it."""
    build.ops[-1] = replace(build.ops[-1], saved=())
    return name


GRAPH = decoder_graph()


def table_of(policy: str) -> CostTable:
    table = CostTables(GRAPH, plain_cluster(), keep=policy).table(stage_mesh(1), 1)
    assert table is not None
    return table


def in_layer(table: CostTable, field: str) -> dict[str, float]:
    """Figure of every op of a middle layer, by its name without the number."""
    found = {}
    for node in table.nodes:
        if node.kind == "op" and 2 in node.blocks:
            found[node.names[node.blocks.index(2)].rpartition("_")[0]] = float(getattr(node, field)[0])
    return found


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        # inputs of both norms, of q k v, of out, of up; q, k, v; up and gelu, four times as wide; the probabilities
        ("none", 16 * U + S),
        ("selective", 16 * U),
        # what enters, every other product from q (q, v, up)
        ("selective-op", U + U + U + 4 * U),
        # what enters, and half of the rest
        ("alternate", U + (15 * U + S) / 2),
    ],
)
def test_bytes_that_stay_are_those_counted_by_hand(policy: str, kept: float) -> None:
    assert sum(in_layer(table_of(policy), "activation_bytes").values()) == pytest.approx(kept)


RERUN = {
    "none": {},
    "selective": dict.fromkeys(("scores", "softmax", "context"), 1.0),
    # all but the products that stay, up to the last value that backward needs
    "selective-op": dict.fromkeys(
        ("norm", "k", "turn", "scores", "softmax", "context", "out", "first", "second_norm", "gelu"), 1.0
    ),
    "alternate": dict.fromkeys(in_layer(table_of("none"), "forward_s"), 0.5),
}


@pytest.mark.parametrize("policy", KEPT)
def test_backward_and_energy_grow_by_the_forward_that_runs_again(policy: str) -> None:
    plain, again = table_of("none"), table_of(policy)
    forward_s, backward_s, energy_j = (in_layer(plain, f) for f in ("forward_s", "backward_s", "microbatch_j"))
    assert in_layer(again, "forward_s") == forward_s
    for name, seconds in in_layer(again, "backward_s").items():
        times = RERUN[policy].get(name, 0.0)
        assert seconds == pytest.approx(backward_s[name] + times * forward_s[name]), name
        total = forward_s[name] + backward_s[name]
        expected_j = energy_j[name] * (1 + times * forward_s[name] / total) if total else 0.0
        assert in_layer(again, "microbatch_j")[name] == pytest.approx(expected_j)


@pytest.mark.parametrize(("policy", "back"), [("selective", S), ("selective-op", 16 * U + S - (U + U + U + 4 * U))])
def test_what_comes_back_takes_room_beside_every_op_of_its_block(policy: str, back: float) -> None:
    plain, again = (in_layer(table_of(p), "workspace_bytes") for p in ("none", policy))
    assert {name: again[name] - plain[name] for name in plain} == dict.fromkeys(plain, pytest.approx(back))


def test_the_block_of_the_loss_keeps_everything() -> None:
    for policy in KEPT[1:]:
        assert {GRAPH.op(name).block for name in recomputed(GRAPH, policy)} == {0, 1, 2, 3}


def test_policies_trade_memory_for_time() -> None:
    found = []
    for policy, recompute in (*((p, "none") for p in ("none", "selective", "selective-op")), ("none", "full")):
        tables = CostTables(GRAPH, plain_cluster(), keep=policy)
        table = table_of(policy)
        predicted = predict(tables, decide(table, first_finite(table), recompute=recompute))
        kept = sum(float(n.activation_bytes[0]) * len(n.blocks) for n in table.nodes)
        if recompute == "full":
            kept = sum(float(n.boundary_bytes[0]) * len(n.blocks) for n in table.nodes)
        found.append((kept, predicted.step_time_s.value))
    kept, seconds = zip(*found, strict=True)
    assert list(kept) == sorted(kept, reverse=True)
    assert list(seconds) == sorted(seconds)
    assert len(set(kept)) == len(set(seconds)) == 4


def test_a_fused_attention_runs_again_and_gives_up_its_statistics_alone() -> None:
    values, ops = dict(GRAPH.values), []
    for op in GRAPH.ops:
        if op.name.startswith(("scores", "softmax")):
            continue
        if op.name.startswith("context"):
            i = op.name[-1]
            operands = (f"q_{i}", f"k_{i}", f"v_{i}")
            target = "aten.scaled_dot_product_attention.default"
            op = replace(op, target=target, inputs=operands, saved=(*operands, op.name), saved_extra_bytes=64)  # noqa: PLW2901
        ops.append(op)
    bounds = [min(i for i, op in enumerate(ops) if op.block == b.index) for b in GRAPH.blocks] + [len(ops)]
    blocks = tuple(replace(b, start=bounds[b.index], stop=bounds[b.index + 1]) for b in GRAPH.blocks)
    graph = replace(GRAPH, ops=tuple(ops), values=values, blocks=blocks)
    found = recomputed(graph, "selective")["context_1"]
    assert (found.reruns, found.extra) == (1.0, 0.0)
    assert found.kept == {"q_1": 1.0, "k_1": 1.0, "v_1": 1.0, "context_1": 1.0}


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy"):
        recomputed(GRAPH, "full")
