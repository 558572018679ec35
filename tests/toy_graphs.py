"""Small OpGraphs written by hand, as capture would make them, for tests that need no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from autopar.ir.graph import Block, Op, OpGraph, Ref, Value
from autopar.ir.tensor import TensorMeta


class GraphBuilder:
    """Adds values and ops in order; blocks are opened by `block`."""

    def __init__(self, batch: int, dtype: str = "float32") -> None:
        self.batch = batch
        self.dtype = dtype
        self.values: dict[str, Value] = {}
        self.ops: list[Op] = []
        self.blocks: list[Block] = []

    def outside(self, name: str, shape: Sequence[int], origin: str, **fields: Any) -> str:
        """A parameter, buffer, constant or input."""
        meta = TensorMeta(tuple(shape), fields.pop("dtype", self.dtype))
        grad = origin == "parameter"
        self.values[name] = Value(name, meta, origin, grad, name, fqn=name.replace("_", "."), **fields)
        return name

    def op(self, name: str, target: str, inputs: Sequence[str], shape: Sequence[int], **fields: Any) -> str:
        """One op with one result of the graph's dtype."""
        grad = any(self.values[i].requires_grad for i in inputs)
        extra = fields.pop("constants", ())
        view_of = fields.pop("view_of", name)
        self.values[name] = Value(name, TensorMeta(tuple(shape), self.dtype), "op", grad, view_of)
        args = (*(Ref(i) for i in range(len(inputs))), *extra)
        block = len(self.blocks) - 1
        self.ops.append(Op(name, target, tuple(inputs), (name,), args, block=block, **fields))
        last = self.blocks[block]
        self.blocks[block] = Block(last.index, last.name, last.start, len(self.ops), last.class_id)
        return name

    def block(self, class_id: str) -> None:
        """Opens a block."""
        index, at = len(self.blocks), len(self.ops)
        self.blocks.append(Block(index, f"block{index}", at, at, class_id))

    def linear(self, name: str, x: str, width: int, bias: bool = True) -> str:
        """aten.linear with new parameters."""
        *lead, depth = self.values[x].meta.shape
        names = [x, self.outside(f"{name}_weight", (width, depth), "parameter")]
        if bias:
            names.append(self.outside(f"{name}_bias", (width,), "parameter"))
        rows = 1
        for size in lead:
            rows *= size
        flops = 2 * rows * width * depth
        gradients = 1 + self.values[x].requires_grad
        saved = (x,) if self.values[x].origin != "parameter" else ()
        return self.op(
            name, "aten.linear.default", names, (*lead, width), flops_forward=flops, flops_backward=gradients * flops,
            saved=saved,
        )  # fmt: skip

    def graph(self, loss: str, optimizer: str = "adamw") -> OpGraph:
        return OpGraph("toy", tuple(self.ops), self.values, tuple(self.blocks), loss, self.batch, optimizer)


def mlp_graph(batch: int = 8, dims: Sequence[int] = (4, 8, 4), *, bias: bool = True, dtype: str = "float32") -> OpGraph:
    """Linear layers with relu between them and a mean-squared loss; one block per layer, the loss in the last."""
    build = GraphBuilder(batch, dtype)
    x = build.outside("x", (batch, dims[0]), "input", batch_dim=0)
    target = build.outside("target", (batch, dims[-1]), "input", batch_dim=0)
    for i, (depth, width) in enumerate(itertools.pairwise(dims)):
        is_last = i == len(dims) - 2
        build.block(f"{depth}x{width}" + ("-last" if is_last else ""))
        x = build.linear(f"linear_{i}", x, width, bias)
        if not is_last:
            x = build.op(f"relu_{i}", "aten.relu.default", [x], (batch, width), saved=(f"relu_{i}",))
    loss = build.op("mse_loss", "aten.mse_loss.default", [x, target], (), saved=(x, target))
    return build.graph(loss)


def residual_graph(batch: int = 8, width: int = 8, layers: int = 3) -> OpGraph:
    """Blocks `x + linear(relu(linear(x)))` of one class, whose output two ops of the next block read; then a loss."""
    build = GraphBuilder(batch)
    x = build.outside("x", (batch, width), "input", batch_dim=0)
    target = build.outside("target", (batch, width), "input", batch_dim=0)
    build.block("embed")
    x = build.linear("embed", x, width, bias=False)
    for i in range(layers):
        build.block("layer")
        hidden = build.linear(f"up_{i}", x, 4 * width, bias=False)
        hidden = build.op(f"relu_{i}", "aten.relu.default", [hidden], (batch, 4 * width), saved=(f"relu_{i}",))
        down = build.linear(f"down_{i}", hidden, width, bias=False)
        x = build.op(f"add_{i}", "aten.add.Tensor", [x, down], (batch, width))
    build.block("head")
    x = build.linear("head", x, width, bias=False)
    loss = build.op("mse_loss", "aten.mse_loss.default", [x, target], (), saved=(x, target))
    return build.graph(loss)


def attention_graph(batch: int = 4, heads: int = 2, length: int = 4, depth: int = 4) -> OpGraph:
    """One head-split self-attention between two linear layers, with views, and a loss."""
    build = GraphBuilder(batch)
    width = heads * depth
    shape, split, turned = (batch, length, width), (batch, length, heads, depth), (batch, heads, length, depth)
    x = build.outside("x", shape, "input", batch_dim=0)
    target = build.outside("target", shape, "input", batch_dim=0)
    build.block("attention")
    parts = []
    for name in ("q", "k", "v"):
        made = build.linear(name, x, width, bias=False)
        seen = build.op(f"{name}_view", "aten.view.default", [made], split, constants=(split,), view_of=made)
        parts.append(build.op(f"{name}_turn", "aten.transpose.int", [seen], turned, constants=(1, 2), view_of=made))
    flops = 4 * batch * heads * length * length * depth
    mixed = build.op(
        "attention", "aten.scaled_dot_product_attention.default", parts, turned,
        flops_forward=flops, flops_backward=2 * flops, saved=("q", "k", "v", "attention"),
    )  # fmt: skip
    back = build.op("back", "aten.transpose.int", [mixed], split, constants=(1, 2), view_of=mixed)
    flat = build.op("flat", "aten.reshape.default", [back], shape, constants=(shape,))
    out = build.linear("out", flat, width, bias=False)
    build.block("loss")
    loss = build.op("mse_loss", "aten.mse_loss.default", [out, target], (), saved=(out, target))
    return build.graph(loss)
