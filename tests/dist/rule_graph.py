"""One op as a whole graph: its operands are parameters and inputs, its loss a weighted sum of its results."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from autopar.ir.graph import Block, Op, OpGraph, Ref, Value
from autopar.ir.mesh import StageMesh
from autopar.ir.solution import Decisions
from autopar.ir.strategy import Strategy
from autopar.ir.tensor import TensorMeta
from autopar.rewrite.program import replicated_decisions
from autopar.rules.strategies import axis_strategies, local_metas
from tests.rules_cases import Case, build

SCALAR = TensorMeta((), "float64")


def rule_graph(case: Case) -> tuple[OpGraph, dict[str, Tensor]] | None:
    """The graph and its tensors from outside by value name, or None if no gradient flows through the op."""
    op, values, tensors = build(case)
    state = dict(zip(op.inputs, tensors, strict=True))
    for name, tensor in state.items():
        origin = (
            "buffer" if values[name].origin == "buffer" else "parameter" if tensor.is_floating_point() else "constant"
        )
        values[name] = replace(values[name], origin=origin, fqn=name)
    results = [name for name in op.outputs if values[name].requires_grad]
    if not results:
        return None
    ops, terms = [op], []
    for index, name in enumerate(results):
        weight = f"w{index}"
        meta = values[name].meta
        state[weight] = torch.rand(meta.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        values[weight] = Value(weight, meta, "constant", requires_grad=False, root=weight, fqn=weight)
        ops.append(_op(f"weighted{index}", "aten.mul.Tensor", (name, weight), meta, values))
        ops.append(_op(f"term{index}", "aten.sum.default", (f"weighted{index}",), SCALAR, values))
        terms.append(f"term{index}")
    loss = terms[0]
    for index, term in enumerate(terms[1:], start=1):
        ops.append(_op(f"total{index}", "aten.add.Tensor", (loss, term), SCALAR, values))
        loss = f"total{index}"
    block = Block(0, "all", 0, len(ops), "all")
    ops = [replace(o, block=0) for o in ops]
    return OpGraph(str(case), tuple(ops), values, (block,), loss, batch_size=4), state


def _op(name: str, target: str, inputs: tuple[str, ...], meta: TensorMeta, values: dict[str, Value]) -> Op:
    values[name] = Value(name, meta, "op", requires_grad=True, root=name)
    return Op(name, target, inputs, (name,), tuple(Ref(i) for i in range(len(inputs))))


def strategies_on(graph: OpGraph, mesh: StageMesh, rng: random.Random, count: int) -> list[Strategy]:
    """All strategies of the graph's first op on a mesh, or `count` of them drawn at random."""
    op = graph.ops[0]
    found: list[Strategy] = [()]
    for size in mesh.sizes:
        found = [(*s, axis) for s in found for axis in axis_strategies(op, graph.values, size)]
    fitting = [s for s in found if local_metas(op, s, mesh.sizes, graph.values) is not None]
    return fitting if len(fitting) <= count else rng.sample(fitting, count)


def decisions_with(graph: OpGraph, mesh: StageMesh, strategy: Strategy) -> Decisions:
    """Everything replicated but the first op."""
    base = replicated_decisions(graph, mesh)
    return replace(base, ops={**base.ops, graph.ops[0].name: strategy})
