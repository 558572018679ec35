"""In which placement the results of a graph leave it."""

from __future__ import annotations

from autopar.ir.graph import Output
from autopar.ir.placement import INVARIANT, Sharding


def left_as(sharding: Sharding, output: Output) -> Sharding:
    """Placement in which an output that is held in `sharding` leaves.

    One that stays is finished where it is a partial sum, any other is whole but for samples.
    """
    return tuple(p if p.is_shard and (output.stays or p.dim == output.batch_dim) else INVARIANT for p in sharding)
