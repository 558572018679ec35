"""LocalCall: what one rank executes for an op under a strategy. Data only; `rewrite` turns it into torch calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.ir.graph import Arg


@dataclass(frozen=True, slots=True)
class LocalCall:
    """One call on shards.

    Attributes:
        target: the op's own target, or one of the `autopar.*` local operations below.
        args, kwargs: as in `Op`, with sizes replaced by local ones. For `autopar.*` targets the original args, plus
            the keyword arguments listed below.
        scale: the result is multiplied by this (1.0 unless a mean runs over a split dim).

    Local operations. `*_axes` are tuples of mesh axis indices, outermost first.

    | target                      | extra kwargs                 | meaning                                               |
    |-----------------------------|------------------------------|-------------------------------------------------------|
    | `autopar.embedding_rows`    | row_axes, num_rows           | weight holds a slice of the rows; other ids give 0    |
    | `autopar.cross_entropy`     | token_axes, class_axes       | mean over all tokens of all ranks; result Partial on  |
    |                             |                              | token_axes; classes are split over class_axes         |
    | `autopar.batch_norm`        | batch_axes                   | statistics over all ranks of batch_axes               |
    | `autopar.dropout`           | op_name, global_shape,       | the slice of the mask that the whole op would draw    |
    |                             | sharding                     | from the stream (step, microbatch, op_name)           |
    | `autopar.attention_dropout` | op_name, global_shape,       | scaled_dot_product_attention with dropout_p > 0; the  |
    |                             | sharding                     | mask is that of the (.., L, S) weights, same rule     |
    """

    target: str
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg] = field(default_factory=dict)
    scale: float = 1.0
