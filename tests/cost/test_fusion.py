"""Fused kernels against traffic counted by hand."""

from __future__ import annotations

import itertools

import pytest

from autopar.cost.fusion import Fusion, make_fusion
from autopar.cost.table import CostTables
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.software import FUSIONS, Software
from tests.cost.devices import plain_cluster
from tests.toy_graphs import GraphBuilder, attention_graph, mlp_graph, residual_graph

ROWS, WIDTH = 8, 16
UNIT = ROWS * WIDTH * 4
"""Bytes of one activation below."""


def gated_graph() -> OpGraph:
    """silu(gate(x)) * up(x), dropped out and added to x, normalised, then a linear layer and a loss."""
    build = GraphBuilder(ROWS)
    x = build.outside("x", (ROWS, WIDTH), "input", batch_dim=0)
    target = build.outside("target", (ROWS, WIDTH), "input", batch_dim=0)
    shape = (ROWS, WIDTH)
    build.block("body")
    x = build.linear("embed", x, WIDTH, bias=False)
    gate = build.linear("gate", x, WIDTH, bias=False)
    up = build.linear("up", x, WIDTH, bias=False)
    silu = build.op("silu", "aten.silu.default", [gate], shape, saved=("gate",))
    mul = build.op("mul", "aten.mul.Tensor", [silu, up], shape, saved=("silu", "up"))
    seen = build.op("seen", "aten.view.default", [mul], shape, view_of="mul")
    down = build.linear("down", seen, WIDTH, bias=False)
    drop = build.op("drop", "aten.dropout.default", [down], shape, saved_extra_bytes=ROWS * WIDTH)
    add = build.op("add", "aten.add.Tensor", [x, drop], shape)
    weight = build.outside("norm_weight", (WIDTH,), "parameter")
    norm = build.op("norm", "aten.rms_norm.default", [add, weight], shape, saved=("add",), saved_extra_bytes=ROWS * 4)
    head = build.linear("head", norm, WIDTH, bias=False)
    last = build.op("last", "aten.add.Tensor", [head, add], shape)
    build.block("loss")
    loss = build.op("mse_loss", "aten.mse_loss.default", [last, target], (), saved=("last", "target"))
    return build.graph(loss)


def fusion(graph: OpGraph, kind: str) -> Fusion:
    return make_fusion(graph, Software(fusion=kind), graph.ops)


def totals(graph: OpGraph, kind: str, **changes: float) -> tuple[float, float, float]:
    """Forward and backward seconds and activation bytes of all ops."""
    tables = CostTables(graph, plain_cluster(**changes), software=Software(fusion=kind))
    table = tables.table(stage_mesh(1), 1)
    assert table is not None
    ops = [node for node in table.nodes if node.kind == "op"]
    forward, backward, kept = (
        sum(float(getattr(node, name)[0]) * len(node.blocks) for node in ops)
        for name in ("forward_s", "backward_s", "activation_bytes")
    )
    return forward, backward, kept


def test_groups_hold_neighbours_and_never_what_lies_around_a_gemm() -> None:
    graph = gated_graph()
    assert fusion(graph, "eager").groups == ()
    assert fusion(graph, "fused").groups == (("silu", "mul", "seen"), ("drop", "add"))
    assert fusion(graph, "compiled").groups == (("silu", "mul", "seen"), ("drop", "add", "norm"))
    # `last` reads `add` too, but a path from one to the other leaves through the GEMM of the head
    assert fusion(graph, "compiled").inner_values == {"silu", "drop"}


def test_fused_kernel_reads_what_enters_and_writes_what_leaves() -> None:
    moves = fusion(gated_graph(), "compiled").moves
    # forward: gate and up in, the product out; backward: its gradient, gate and up again, and both their gradients
    assert (moves["silu"].forward, moves["mul"].forward) == ((1, 0), (0, 1, 1))
    assert (moves["silu"].backward, moves["mul"].backward) == ((2, 0), (0, 2, 1))
    assert [moves[name].forward_kernels for name in ("silu", "mul", "seen")] == [1, 0, 0]
    assert [moves[name].backward_kernels for name in ("silu", "mul", "seen")] == [1, 0, 0]
    # dropout, sum and norm: x and down in; the sum, which is read again, and the norm out
    assert (moves["drop"].forward, moves["add"].forward, moves["norm"].forward) == ((1, 0), (1, 0, 1), (0, 1, 1))


def test_fused_kernel_keeps_sources_instead_of_inner_values() -> None:
    graph = gated_graph()
    for kind in ("fused", "compiled"):
        moves = fusion(graph, kind).moves
        assert (moves["silu"].saved, moves["mul"].saved) == (("gate",), ("up",))
        assert moves["drop"].extra_bytes == ROWS * WIDTH
    eager, fused = totals(graph, "eager"), totals(graph, "fused")
    assert eager[2] - fused[2] == UNIT


def test_compiled_loss_keeps_logits_instead_of_probabilities() -> None:
    build = GraphBuilder(ROWS, "bfloat16")
    x = build.outside("x", (ROWS, WIDTH), "input", batch_dim=0)
    labels = build.outside("labels", (ROWS,), "input", batch_dim=0, dtype="int64")
    build.block("loss")
    logits = build.linear("logits", x, 64, bias=False)
    wide = build.op("wide", "aten.to.dtype", [logits], (ROWS, 64))
    build.op("ce", "aten.cross_entropy_loss.default", [wide, labels], (), saved_extra_bytes=ROWS * 64 * 4)
    moves = fusion(build.graph("ce"), "compiled").moves
    assert moves["wide"].saved == ("logits",)
    assert moves["ce"].extra_bytes == 0


def test_norm_that_a_module_writes_out_is_one_kernel_even_by_hand() -> None:
    build = GraphBuilder(ROWS)
    x = build.outside("x", (ROWS, WIDTH), "input", batch_dim=0)
    build.block("body")
    x = build.linear("embed", x, WIDTH, bias=False)
    weight = build.outside("weight", (WIDTH,), "parameter")
    shape, path = (ROWS, WIDTH), "layer.norm"
    before = build.op("before", "aten.mul.Tensor", [x], shape)
    square = build.op("square", "aten.pow.Tensor_Scalar", [before], shape, module_path=path, saved=("before",))
    mean = build.op("mean", "aten.mean.dim", [square], (ROWS, 1), module_path=path)
    root = build.op("root", "aten.rsqrt.default", [mean], (ROWS, 1), module_path=path, saved=("root",))
    scaled = build.op("scaled", "aten.mul.Tensor", [before, root], shape, module_path=path)
    out = build.op("out", "aten.mul.Tensor", [scaled, weight], shape, module_path=path, saved=("scaled",))
    build.op("loss", "aten.mse_loss.default", [out, x], (), saved=("out", "embed"))
    graph = build.graph("loss")
    norm = ("square", "mean", "root", "scaled", "out")
    assert fusion(graph, "fused").groups == (norm,)
    # also compiled: the loss is no neighbour that a compiler of one block's ops could not take in
    assert fusion(graph, "compiled").groups[0][: len(norm) + 1] == ("before", *norm)


@pytest.mark.parametrize("graph", [gated_graph(), mlp_graph(), residual_graph(), attention_graph()])
@pytest.mark.parametrize("launch_s", [0.0, 1e-6])
def test_more_fusion_is_never_slower_nor_larger(graph: OpGraph, launch_s: float) -> None:
    found = [totals(graph, kind, launch_overhead_s=launch_s) for kind in FUSIONS]
    for less, more in itertools.pairwise(found):
        assert all(b <= a * (1 + 1e-12) for a, b in zip(less, more, strict=True))
