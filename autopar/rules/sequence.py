"""Which dim of each value counts positions of the sequence, and which ops keep the whole width of the model.

Sequence parallelism (Korthikanti et al. 2022) splits along the sequence what tensor parallelism leaves whole: norms,
dropout and residual sums, from the output of a row-parallel product to the input of the next column-parallel one. Those
ops are the `stream`. They are found by what they can do: a norm over the last dim splits along nothing but samples and
positions, and what hangs together with it through values, without a product with a weight between, shares its layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.ir.graph import Op, OpGraph
from autopar.ir.placement import Placement
from autopar.ir.strategy import AxisStrategy
from autopar.rules.batch import follow, settled_strategy
from autopar.rules.call import Values
from autopar.rules.contractions import addmm, attention, bmm, embedding, linear, matmul, mm
from autopar.rules.elementwise import kept_dims, reduction, row_norm
from autopar.rules.experts import moe_experts
from autopar.rules.strategies import axis_strategies
from autopar.rules.table import family_of

Dims = Mapping[str, int | None]
PRODUCTS = (linear, mm, addmm, bmm, matmul, attention, embedding, moe_experts)
"""Families of ops at which the layout of tensor parallelism changes."""
NORMS = (row_norm, reduction, kept_dims)
"""Families of ops that norms consist of."""


@dataclass(frozen=True)
class SequenceParts:
    """What is known about the sequence.

    Attributes:
        dims: sequence dim of every value, None where it has none.
        stream: names of the ops that sequence parallelism splits.
        lookups: names of the ops that look tokens up in a parameter.
    """

    dims: Dims
    stream: frozenset[str]
    lookups: frozenset[str]

    def splits(self, op: Op, strategy: AxisStrategy) -> bool:
        """Whether the strategy splits an operand or a result along the sequence."""
        placed = (*zip(op.inputs, strategy.inputs, strict=True), *zip(op.outputs, strategy.outputs, strict=True))
        return any(placement.is_shard and self.dims[name] == placement.dim for name, placement in placed)


def sequence_parts(graph: OpGraph, batch: Dims) -> SequenceParts:
    """The sequence's part in a graph; `batch` are its batch dims."""
    dims = sequence_dims(graph)
    tokens = {name for name, value in graph.values.items() if not value.meta.is_floating and batch[name] is not None}
    lookups = {op.name for op in graph.ops if family_of(op.target) is embedding and tokens & set(op.inputs)}
    return SequenceParts(dims, _stream(graph, batch, dims), frozenset(lookups))


def sequence_dims(graph: OpGraph) -> dict[str, int | None]:
    """Sequence dim of every value, None where it has none.

    Starts from dim 1 of batch inputs of integers (tokens, labels). Between two operands that both have one (scores of
    queries and keys), the first one's goes on. Values made from sizes alone take the dim that their reader needs.
    """
    inputs = (value for value in graph.outside("input") if value.batch_dim == 0 and not value.meta.is_floating)
    starts = {value.name for value in inputs if len(value.meta.shape) > 1}
    start = {name: 1 if name in starts else None for name in graph.values}

    def choose(op: Op, dims: dict[str, int | None]) -> AxisStrategy | None:
        strategy = sequence_strategy(op, graph.values, dims)
        if strategy is None and family_of(op.target) is attention:
            dims[op.outputs[0]] = dims[op.inputs[0]]  # its rows are positions, also where they cannot be split
        return strategy

    return follow(graph, start, choose)


def sequence_strategy(op: Op, values: Values, dims: Dims) -> AxisStrategy | None:
    """The strategy in which an op follows a split along the sequence, or None; `dims` are those found so far."""
    fitting = [s for s in axis_strategies(op, values)[1:] if _fits(op, s, dims)]
    return max(fitting, key=lambda s: _num_followed(op, s, dims), default=None)


def _fits(op: Op, strategy: AxisStrategy, dims: Dims) -> bool:
    """Operands with a sequence dim split there or stay whole, and one of them does split."""
    placed = [*zip(op.inputs, strategy.inputs, strict=True)]
    known = [(dims[name], placement) for name, placement in placed if dims[name] is not None]
    return any(_splits(p, dim) for dim, p in known) and all(p.holds_whole_value or _splits(p, dim) for dim, p in known)


def _splits(placement: Placement, dim: int | None) -> bool:
    return placement.is_shard and placement.dim == dim


def _num_followed(op: Op, strategy: AxisStrategy, dims: Dims) -> int:
    return sum(_splits(p, dims[name]) for name, p in zip(op.inputs, strategy.inputs, strict=True))


def _stream(graph: OpGraph, batch: Dims, dims: Dims) -> frozenset[str]:
    """Ops in one piece with a norm over the model's width; see the module docstring."""
    between = [op for op in graph.ops if not op.is_shared and family_of(op.target) not in PRODUCTS]
    by_value: dict[str, list[str]] = {}
    for op in between:
        for name in dict.fromkeys((*op.inputs, *op.outputs)):
            if dims[name] is not None:
                by_value.setdefault(name, []).append(op.name)
    values_of = {op.name: [n for n in (*op.inputs, *op.outputs) if n in by_value] for op in between}
    made = {name for op in between for name in op.outputs}
    waiting = [op.name for op in between if _keeps_width(op, graph, batch, dims)]
    found = set(waiting)
    while waiting:
        near = {op for name in values_of[waiting.pop()] if name in made for op in by_value[name]} - found
        found |= near
        waiting += sorted(near)
    return frozenset(found)


def _keeps_width(op: Op, graph: OpGraph, batch: Dims, dims: Dims) -> bool:
    """A norm that splits along samples and positions, and along nothing else except what it sums."""
    if family_of(op.target) not in NORMS or all(dims[name] is None for name in op.outputs):
        return False
    parts = SequenceParts(dims, frozenset(), frozenset())
    by_sample = settled_strategy(op, graph.values, batch, graph.batch_size)
    others = [s for s in axis_strategies(op, graph.values)[1:] if s != by_sample and s.label != "partial"]
    along = [s for s in others if parts.splits(op, s)]
    return bool(along) and all(s in along or s.label.startswith("reduced") or _is_trivial(op, s, graph) for s in others)


def _is_trivial(op: Op, strategy: AxisStrategy, graph: OpGraph) -> bool:
    """Splits a result along a dim of size 1, hence never."""
    placed = zip(op.outputs, strategy.outputs, strict=True)
    return any(p.is_shard and graph.values[name].meta.shape[p.dim] == 1 for name, p in placed)
