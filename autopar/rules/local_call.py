"""From an op and its strategy to the call that one rank makes: local sizes in, split-aware operations where needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autopar.errors import RewriteError
from autopar.ir.graph import Arg, Op
from autopar.ir.placement import Sharding, format_sharding
from autopar.ir.strategy import Strategy, output_sharding
from autopar.rules.call import Values, argument
from autopar.rules.contractions import CONTEXT
from autopar.rules.experts import EXCHANGE, EXPERTS, expert_ids, num_experts, pairs_per_row, token_counts
from autopar.rules.local import LocalCall
from autopar.rules.strategies import local_metas
from autopar.rules.table import packet

SIZE_ARGUMENT: Mapping[str, tuple[int, str]] = {
    "view": (1, "size"), "reshape": (1, "shape"), "_unsafe_view": (1, "size"), "expand": (1, "size"),
    "broadcast_to": (1, "size"), "unflatten": (2, "sizes"),
}  # fmt: skip
"""Where the sizes of the result stand in a call; they are replaced by local ones."""


def local_call(op: Op, strategy: Strategy, axis_sizes: Sequence[int], values: Values) -> LocalCall:
    """The call that a rank makes.

    Raises:
        RewriteError: if the strategy does not divide the op's tensors evenly.
    """
    metas = local_metas(op, strategy, axis_sizes, values)
    if metas is None:
        raise RewriteError(f"{op.name}: strategy does not divide its tensors evenly over mesh {tuple(axis_sizes)}")
    name = packet(op.target)
    special = _special(op, name, strategy, values)
    if special is not None:
        return special
    if name in SIZE_ARGUMENT:
        return _with_sizes(op, *SIZE_ARGUMENT[name], metas[1][0].shape)
    if op.target == "autopar.moe_experts":
        return _region(op, strategy, axis_sizes, values)
    return LocalCall(op.target, op.args, op.kwargs, _mean_scale(op, name, strategy, axis_sizes))


def axes_labelled(strategy: Strategy, prefix: str) -> tuple[int, ...]:
    """Indices of the mesh axes on which the strategy's label starts so."""
    return tuple(i for i, axis in enumerate(strategy) if axis.label.startswith(prefix))


def _special(op: Op, name: str, strategy: Strategy, values: Values) -> LocalCall | None:
    """The `autopar.*` operation that replaces the op, or None where the op itself serves."""
    extra: dict[str, Arg] = {}
    if name == "embedding" and (rows := axes_labelled(strategy, "rows")):
        extra = {"row_axes": rows, "num_rows": values[op.inputs[0]].meta.shape[0]}
        return _replace(op, "autopar.embedding_rows", extra)
    if name in ("cross_entropy_loss", "autopar.token_loss"):
        tokens, classes = axes_labelled(strategy, "tokens"), axes_labelled(strategy, "classes")
        if tokens or classes or op.members:
            target = "autopar.token_loss" if op.members else "autopar.cross_entropy"
            return _replace(op, target, {"token_axes": tokens, "class_axes": classes})
    if name == "batch_norm" and argument(op, 5, "training", False) and (batch := axes_labelled(strategy, "dim0")):
        return _replace(op, "autopar.batch_norm", {"batch_axes": batch})
    if name == "dropout" and argument(op, 1, "p", 0.0) and argument(op, 2, "train", False):
        shape = values[op.outputs[0]].meta.shape
        return _replace(op, "autopar.dropout", _stream(op, shape, output_sharding(strategy, 0)))
    if name == "scaled_dot_product_attention":
        return _attention(op, strategy, values)
    return None


def _attention(op: Op, strategy: Strategy, values: Values) -> LocalCall | None:
    if argument(op, 4, "dropout_p", 0.0):
        query, key = (values[op.inputs[i]].meta.shape for i in (0, 1))
        stream = _stream(op, (*query[:-1], key[-2]), output_sharding(strategy, 0))
        return _replace(op, "autopar.attention_dropout", stream)
    rows = axes_labelled(strategy, CONTEXT)
    return _replace(op, "autopar.causal_attention", {"row_axes": rows}) if rows else None


def _stream(op: Op, shape: tuple[int, ...], sharding: Sharding) -> dict[str, Arg]:
    return {"op_name": op.name, "global_shape": shape, "sharding": format_sharding(sharding)}


def _replace(op: Op, target: str, extra: Mapping[str, Arg]) -> LocalCall:
    return LocalCall(target, op.args, {**op.kwargs, **extra})


def _with_sizes(op: Op, position: int, keyword: str, sizes: tuple[int, ...]) -> LocalCall:
    if packet(op.target) == "unflatten":
        dim = argument(op, 1, "dim", 0)
        before = len(sizes) - len(_tuple(argument(op, 2, "sizes")))
        start = dim % (before + 1) if isinstance(dim, int) else 0
        sizes = sizes[start : len(sizes) - (before - start)]
    if position < len(op.args):
        return LocalCall(op.target, (*op.args[:position], sizes, *op.args[position + 1 :]), op.kwargs)
    return LocalCall(op.target, op.args, {**op.kwargs, keyword: sizes})


def _tuple(arg: Arg) -> tuple[Arg, ...]:
    return arg if isinstance(arg, tuple) else (arg,)


def _region(op: Op, strategy: Strategy, axis_sizes: Sequence[int], values: Values) -> LocalCall:
    """Every axis whose strategy is `tokens` divides the token counts; where experts split, pairs are counted anew."""
    axes = axes_labelled(strategy, EXPERTS) + axes_labelled(strategy, EXCHANGE)
    if axes:
        split: dict[str, Arg] = {
            "expert_axes": tuple(sorted(axes)),
            "is_exchanged": tuple(strategy[i].label == EXCHANGE for i in sorted(axes)),
            "ids": expert_ids(op),
            "pairs_per_row": pairs_per_row(op, values),
            "num_experts": num_experts(op, values),
        }
        return LocalCall("autopar.split_experts", op.args, split)
    ranks = math.prod(axis_sizes[i] for i in axes_labelled(strategy, "tokens"))
    counts = tuple(count // ranks for count in token_counts(op))
    return LocalCall(op.target, op.args, {**op.kwargs, "local_token_counts": counts})


def _mean_scale(op: Op, name: str, strategy: Strategy, axis_sizes: Sequence[int]) -> float:
    """A mean over a split dim averages 1/n of the elements: its terms are scaled by 1/n."""
    is_mean = name == "mean" or (name.endswith(("_loss", "_with_logits")) and _reduces_by_mean(op, name))
    if not is_mean:
        return 1.0
    return 1.0 / math.prod(axis_sizes[i] for i in axes_labelled(strategy, "reduced"))


def _reduces_by_mean(op: Op, name: str) -> bool:
    position = 4 if name == "binary_cross_entropy_with_logits" else 2
    return argument(op, position, "reduction", 1) == 1
