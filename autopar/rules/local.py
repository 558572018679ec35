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

    * `autopar.embedding_rows` (row_axes, num_rows): the weight holds a slice of the rows; ids elsewhere give 0.
    * `autopar.cross_entropy` (token_axes, class_axes): the mean over all tokens of all ranks, as one term of a pending
      sum on token_axes; classes are split over class_axes, on which the result is whole.
    * `autopar.token_loss` (token_axes, class_axes): the same of logits[.. C] and target[..].
    * `autopar.batch_norm` (batch_axes): statistics over all ranks of batch_axes.
    * `autopar.dropout` (op_name, global_shape, sharding): the slice of the mask that the whole op would draw from the
      stream (step, microbatch, op_name); `sharding` is text as of `format_sharding`.
    * `autopar.attention_dropout` (op_name, global_shape, sharding): scaled_dot_product_attention with dropout_p > 0;
      the same rule, for the mask of the (batch, head, row, column) weights.
    * `autopar.causal_attention` (row_axes): the queries are this rank's run of rows, keys and values are whole; ranks
      at mirrored positions trade the second halves of their runs, so that all do the same work.
    * `autopar.moe_experts`: the members of the region run on the local tokens (`token_counts` are local).
    * `autopar.split_experts` (expert_axes, is_exchanged, ids, pairs_per_row, num_experts): the members run on the pairs
      of this rank's experts; see `rules.experts`.
    """

    target: str
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg] = field(default_factory=dict)
    scale: float = 1.0
