"""Which dim of each value counts samples, found by following the batch through the rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopar.ir.graph import Op, OpGraph
from autopar.ir.placement import Placement
from autopar.ir.strategy import AxisStrategy
from autopar.rules.call import Values
from autopar.rules.strategies import axis_strategies


def batch_dims(graph: OpGraph) -> dict[str, int | None]:
    """Batch dim of every value, None where it has none.

    Starts from the batch inputs. A value without gradient that shows none of its own (a mask made from sizes alone)
    takes the dim that its first consumer needs, because it can be sliced freely. An op may also make samples from
    sizes; where other sizes equal the batch, which op does is guessed so that the most values have samples.
    """
    readers: dict[str, list[Op]] = {}
    for op in graph.ops:
        for name in op.inputs:
            readers.setdefault(name, []).append(op)
    best = _batch_dims(graph, readers, frozenset())
    tried: set[str] = set()
    while best.has_lost and (makers := [name for name in best.makers if name not in tried]):
        tried.add(makers[0])
        without = _batch_dims(graph, readers, best.denied | {makers[0]})
        best = without if without.num_known > best.num_known else best
    return best.dims


@dataclass(frozen=True)
class _Guess:
    """Batch dims under a guess of which ops make samples from sizes.

    Attributes:
        denied, makers: ops that must not, and ops that do, in execution order.
        has_lost: some op reads samples and has no strategy to split them.
        num_known: differentiable values with a batch dim.
    """

    dims: dict[str, int | None]
    denied: frozenset[str]
    makers: tuple[str, ...]
    has_lost: bool
    num_known: int


def _batch_dims(graph: OpGraph, readers: Mapping[str, list[Op]], denied: frozenset[str]) -> _Guess:
    """Batch dims where all ops that can, but for the `denied`, make samples from sizes."""
    makers: list[str] = []
    lost: list[str] = []

    def choose(op: Op, dims: dict[str, int | None]) -> AxisStrategy | None:
        strategy = batch_strategy(op, graph.values, dims, graph.batch_size)
        if op.members:
            dims |= _inside(op, graph.values, dims)
        has_samples = any(dims[name] is not None for name in op.inputs)
        if strategy is None:
            lost.extend([op.name] * (has_samples and not op.is_shared))
        elif not has_samples:
            if op.name in denied or not _suits(strategy, op, graph.values, dims, readers):
                return None
            makers.append(op.name)
        return strategy

    dims = follow(graph, {name: value.batch_dim for name, value in graph.values.items()}, choose)
    known = sum(dims[value.name] is not None for value in graph.values.values() if value.requires_grad)
    return _Guess(dims, denied, tuple(makers), bool(lost), known)


def _suits(
    strategy: AxisStrategy, op: Op, values: Values, dims: Mapping[str, int | None], readers: Mapping[str, list[Op]]
) -> bool:
    """Whether a batch made by size may be one: no reader that has a batch already would lose it by that."""
    made = {name: _dim(placement) for name, placement in zip(op.outputs, strategy.outputs, strict=True)}
    for reader in (reader for name in op.outputs for reader in readers.get(name, ())):
        without = batch_strategy(reader, values, dims)
        if without is not None and batch_strategy(reader, values, {**dims, **made}) is None:
            return False
    return True


def settled_strategy(op: Op, values: Values, dims: Mapping[str, int | None], batch_size: int) -> AxisStrategy | None:
    """The op's data-parallel strategy under all dims of `batch_dims`, or None."""
    strategy = batch_strategy(op, values, dims, batch_size)
    if strategy is None or any(
        _dim(placement) != dims[name] for name, placement in zip(op.outputs, strategy.outputs, strict=True)
    ):
        return None
    return strategy


def follow(
    graph: OpGraph, start: Mapping[str, int | None], choose: Callable[[Op, dict[str, int | None]], AxisStrategy | None]
) -> dict[str, int | None]:
    """The dims of all values that a split of some of them brings with it.

    Args:
        start: the dim of each value at which the split begins, None elsewhere.
        choose: the strategy in which an op carries the split on, given the dims found so far.
    """
    dims = dict(start)
    for op in itertools.chain.from_iterable((*op.members, op) for op in graph.ops):
        strategy = choose(op, dims)
        if strategy is None:
            continue
        for name, placement in zip(op.outputs, strategy.outputs, strict=True):
            dims[name] = _dim(placement)
        for name, placement in zip(op.inputs, strategy.inputs, strict=True):
            if placement.is_shard and dims[name] is None:
                dims[name] = placement.dim
    return dims


def _inside(region: Op, values: Values, dims: Mapping[str, int | None]) -> dict[str, int | None]:
    """Values within a region of tokens that it permutes: dim 0 counts tokens, hence samples."""
    counts = region.kwargs.get("token_counts")
    if not isinstance(counts, tuple) or all(dims[name] is None for name in region.inputs):
        return {}
    made = [name for member in region.members for name in member.outputs]
    return {name: 0 for name in made if values[name].meta.shape[:1] and values[name].meta.shape[0] in counts}


def batch_strategy(op: Op, values: Values, dims: Mapping[str, int | None], batch_size: int = 0) -> AxisStrategy | None:
    """The op's data-parallel strategy: operands split along their batch dims and nothing else, or None.

    Args:
        op: the op.
        values: the graph's values.
        dims: batch dims found so far (complete, if `batch_dims` made them).
        batch_size: if given, an op that creates the batch dim (expanding a parameter) may match by size.
    """
    candidates = axis_strategies(op, values)[1:]
    for strategy in candidates:
        if any(p.is_shard for p in strategy.inputs) and _agrees(op, strategy, values, dims):
            return strategy
    for strategy in candidates:
        if _creates_batch(op, strategy, values, dims, batch_size):
            return strategy
    return None


def _agrees(op: Op, strategy: AxisStrategy, values: Values, dims: Mapping[str, int | None]) -> bool:
    has_batch = False
    for name, placement in zip(op.inputs, strategy.inputs, strict=True):
        if dims[name] is not None:
            if _dim(placement) != dims[name]:
                return False
            has_batch = True
        elif not (placement.holds_whole_value or (placement.is_shard and _is_flexible(values, name))):
            return False
    return has_batch


def _creates_batch(
    op: Op, strategy: AxisStrategy, values: Values, dims: Mapping[str, int | None], batch_size: int
) -> bool:
    """The op makes a differentiable batch from none: a parameter expanded, or looked up by ids made from sizes."""
    if any(dims[name] is not None for name in op.inputs):
        return False
    for name, placement in zip(op.inputs, strategy.inputs, strict=True):
        counts_samples = placement.dim == 0 and values[name].meta.shape[0] == batch_size
        if not (placement.holds_whole_value or (counts_samples and _is_flexible(values, name))):
            return False
    result = values[op.outputs[0]]
    known = dims.get(op.outputs[0])
    if known is not None:
        return strategy.outputs[0].dim == known
    return strategy.outputs[0].dim == 0 and result.meta.shape[0] == batch_size and result.requires_grad


def _is_flexible(values: Values, name: str) -> bool:
    return not values[name].requires_grad and values[name].origin != "parameter"


def _dim(placement: Placement) -> int | None:
    return placement.dim if placement.is_shard else None
