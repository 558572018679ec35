"""How one mesh axis may store and expose a parameter."""

from __future__ import annotations

from autopar.ir.graph import Value
from autopar.ir.placement import INVARIANT, REPLICATE, shard
from autopar.ir.strategy import ParameterAxisStrategy


def parameter_axis_strategies(value: Value) -> tuple[ParameterAxisStrategy, ...]:
    """All ways, `invariant` first. Data-parallel sharding (zero1 to zero3) uses the first dim that is longer than 1.

    A frozen parameter has no gradient: it is stored whole or sliced, never synchronised.
    """
    dims = [dim for dim, size in enumerate(value.meta.shape) if size > 1]
    sliced = [ParameterAxisStrategy("sharded", shard(d), shard(d), shard(d)) for d in dims]
    whole = [ParameterAxisStrategy("invariant", INVARIANT, INVARIANT, INVARIANT)]
    if not value.requires_grad:
        return (*whole, *sliced)
    whole.append(ParameterAxisStrategy("replicated", INVARIANT, REPLICATE, INVARIANT))
    if dims:
        first = shard(dims[0])
        whole.append(ParameterAxisStrategy("zero1", INVARIANT, REPLICATE, first))
        whole.append(ParameterAxisStrategy("zero2", INVARIANT, REPLICATE, first))
        whole.append(ParameterAxisStrategy("zero3", first, REPLICATE, first))
    return (*whole, *sliced)
