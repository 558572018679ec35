"""The rule of mixture-of-experts regions (`autopar.moe_experts`, see `capture.regions`): by token, or by expert."""

from __future__ import annotations

from autopar.ir.graph import Op, Value
from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, Placement, shard
from autopar.ir.strategy import AxisStrategy
from autopar.rules.call import Values
from autopar.rules.contractions import CONTEXT
from autopar.rules.labels import Dims, Labels, split

EXPERTS, EXCHANGE = "experts", "exchange"
EXCHANGING = (EXCHANGE, CONTEXT)
"""Labels of strategies that send operands to other ranks of the axis, and the results back, inside the op."""
COUNTER = "aten.histc.default"
"""The call that counts the pairs of each expert: (ids, number of experts, 0, last expert)."""


def moe_experts(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """A region that permutes (token, choice) pairs and undoes it.

    * `tokens`: every value indexed by token in dim 0 splits there together, experts whole;
    * `experts`: each rank has some experts, all have all tokens; the result is a term of a sum;
    * `exchange`: each rank has some experts and some tokens, and pairs are sent to their experts and back.

    FLOPs are taken as evenly split: balanced routing.
    """
    regions = Labels(
        tuple(_labels(values[name], op) for name in op.inputs), tuple(_labels(values[name], op) for name in op.outputs)
    )
    by_token = split(regions, "tokens")
    if num_experts(op, values) is None:
        return (by_token,)

    def placements(activation: Placement) -> tuple[Placement, ...]:
        found = (shard(0) if values[n].origin == "parameter" else activation for n in op.inputs)
        ids = expert_ids(op)
        return tuple(INVARIANT if i == ids and activation == REPLICATE else p for i, p in enumerate(found))

    return (
        by_token,
        AxisStrategy(EXPERTS, placements(REPLICATE), (PARTIAL,), splits_work=True),
        AxisStrategy(EXCHANGE, placements(shard(0)), (shard(0),), splits_work=True),
    )


def token_counts(op: Op) -> tuple[int, ...]:
    """Sizes of dim 0 that grow with the tokens: pairs first. Raises TypeError if the region does not say."""
    counts = op.kwargs["token_counts"]
    if not isinstance(counts, tuple):
        raise TypeError(f"{op.name}: token_counts is {counts!r}, expected a tuple")
    return tuple(count for count in counts if isinstance(count, int))


def _labels(value: Value, op: Op) -> Dims:
    shape = value.meta.shape
    is_token = value.origin != "parameter" and shape[:1] != () and shape[0] in token_counts(op)
    return tuple("tokens" if is_token and i == 0 else None for i in range(len(shape)))


def expert_ids(op: Op) -> int:
    """Which input holds the expert of each pair: the one that the region sorts."""
    sort = next(member for member in op.members if "sort" in member.target)
    return op.inputs.index(sort.inputs[0])


def num_experts(op: Op, values: Values) -> int | None:
    """Experts, where they can be split: every parameter has one slice per expert, and they are counted once."""
    sizes = {values[name].meta.shape[:1] for name in op.inputs if values[name].origin == "parameter"}
    counters = [member.args[1:] for member in op.members if member.target == COUNTER]
    if len(sizes) != 1 or len(counters) != 1:
        return None
    (size,) = sizes
    return size[0] if size and counters[0] == (size[0], 0, size[0] - 1) else None


def pairs_per_row(op: Op, values: Values) -> tuple[int, ...]:
    """How many pairs each row of an input stands for; 0 for parameters."""
    pairs = values[op.inputs[expert_ids(op)]].meta.shape[0]
    return tuple(0 if values[name].origin == "parameter" else pairs // values[name].meta.shape[0] for name in op.inputs)


def exchanged_values(op: Op, values: Values) -> tuple[tuple[str, int], ...]:
    """(value, times) that an exchange sends in forward: the rows of all pairs there, their results back.

    Backward sends the same. Attention trades half of its queries and results with one rank, which takes as long as
    the all_to_all of the whole on two ranks, and no longer on more.
    """
    if not op.members:
        return ((op.inputs[0], 1), (op.outputs[0], 1))
    there = zip(op.inputs, pairs_per_row(op, values), strict=True)
    return (*there, *((name, 1) for name in op.outputs))
