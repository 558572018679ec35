"""Rules of ops that act element by element, row by row, or reduce: pointwise, norms, softmax, reductions, losses."""

from __future__ import annotations

from autopar.ir.graph import Op, Ref
from autopar.ir.placement import INVARIANT, REPLICATE, shard
from autopar.ir.strategy import AxisStrategy
from autopar.rules.call import (
    Values,
    argument,
    input_index,
    input_metas,
    integer,
    integers,
    normal_dim,
    output_metas,
)
from autopar.rules.labels import Dims, Labels, broadcast_labels, dim_labels, partial, split_each

MEAN = 1
"""Value of the `reduction` argument of ATen losses that means the mean."""


def pointwise(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Any dim of the result; operands that are broadcast along it stay whole."""
    shape = output_metas(op, values)[0].shape
    after = dim_labels(len(shape))
    inputs = tuple(broadcast_labels(meta.shape, shape, after) for meta in input_metas(op, values))
    return split_each(Labels(inputs, (after,)))


def broadcast(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """broadcast_tensors: every operand grows to the common shape."""
    shape = output_metas(op, values)[0].shape
    after = dim_labels(len(shape))
    inputs = tuple(broadcast_labels(meta.shape, shape, after) for meta in input_metas(op, values))
    return (*split_each(Labels(inputs, (after,) * len(op.outputs))), partial(len(op.inputs), len(op.outputs)))


def linear_pointwise(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Pointwise and linear in all tensors together: also works on pending sums."""
    return (*pointwise(op, values), partial(len(op.inputs), 1))


def sum_of_terms(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """add, sub: linear if both operands are tensors of the result's shape (a broadcast term is fine too)."""
    if isinstance(argument(op, 1, "other"), Ref):
        return linear_pointwise(op, values)
    return pointwise(op, values)


def product(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """mul, div: linear if the second operand is a number."""
    if len(op.inputs) == 1 and isinstance(argument(op, 0, "self"), Ref):
        return linear_pointwise(op, values)
    return pointwise(op, values)


def row_norm(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """layer_norm, rms_norm: x[.. normalized], w, b -> y; the leading dims split."""
    metas = input_metas(op, values)
    num_normalized = len(integers(op, 1, "normalized_shape") or ())
    num_dims = len(metas[0].shape)
    labels = dim_labels(num_dims, range(num_dims - num_normalized, num_dims))
    others = tuple((None,) * len(meta.shape) for meta in metas[1:])
    return split_each(Labels((labels, *others), (labels,) * len(op.outputs)))


def sample_norm(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """group_norm, instance_norm: each sample by itself."""
    metas = input_metas(op, values)
    sample: Dims = ("dim0", *((None,) * (len(metas[0].shape) - 1)))
    others = tuple((None,) * len(meta.shape) for meta in metas[1:])
    return split_each(Labels((sample, *others), (sample,)))


def batch_norm(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Samples split; in training the statistics are those of all ranks (`autopar.batch_norm`)."""
    inputs = tuple(shard(0) if i == 0 else REPLICATE for i in range(len(op.inputs)))
    return (AxisStrategy("dim0", inputs, (shard(0),), splits_work=True),)


def along_last(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """softmax, cumsum, sort, topk, max along one dim: every other dim."""
    shape = input_metas(op, values)[0].shape
    position, name = DIM_ARGUMENT.get(op.target, (1, "dim"))
    dim = normal_dim(integer(op, position, name, -1), len(shape))
    before = dim_labels(len(shape), (dim,))
    drops = len(output_metas(op, values)[0].shape) < len(shape)
    after = tuple(label for i, label in enumerate(before) if not (drops and i == dim))
    return split_each(Labels((before,) * len(op.inputs), (after,) * len(op.outputs)))


DIM_ARGUMENT = {"aten.topk.default": (2, "dim"), "aten.sort.default": (1, "dim")}


def reduction(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Sum and mean over dims: kept dims, and reduced dims with a partial result (means are scaled)."""
    shape = input_metas(op, values)[0].shape
    result = output_metas(op, values)[0].shape
    dims = integers(op, 1, "dim") if op.target not in ("aten.sum.default", "aten.mean.default") else None
    reduced = {normal_dim(d, len(shape)) for d in dims} if dims else set(range(len(shape)))
    keeps = len(result) == len(shape) and len(shape) > 0
    before = tuple(f"reduced{i}" if i in reduced else f"dim{i}" for i in range(len(shape)))
    after = tuple(None if i in reduced else before[i] for i in range(len(shape)) if keeps or i not in reduced)
    return (*split_each(Labels((before,), (after,))), partial(1, 1))


def kept_dims(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """amax, var, norm, ...: only the dims that are kept."""
    return tuple(s for s in reduction(op, values) if s.label.startswith("dim"))


def pairwise_loss(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """mse_loss, l1_loss, binary cross entropy: x, y of one shape -> a scalar; any dim, result partial."""
    metas = input_metas(op, values)
    if output_metas(op, values)[0].shape != () or len({meta.shape for meta in metas}) != 1:
        return ()
    labels = dim_labels(len(metas[0].shape), prefix="reduced")
    return split_each(Labels((labels,) * len(metas), ((),)))


def cross_entropy(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """logits[n c ..], target[n ..] -> scalar: tokens (partial result), or classes (result whole everywhere)."""
    metas = input_metas(op, values)
    is_plain = (
        input_index(op, 2, "weight") is None
        and argument(op, 3, "reduction", MEAN) == MEAN
        and len(metas[0].shape) >= 2
        and not metas[1].is_floating
    )
    if not is_plain:
        return ()
    spatial = tuple(f"tokens{i}" for i in range(2, len(metas[0].shape)))
    tokens = split_each(Labels((("tokens0", None, *spatial), ("tokens0", *spatial)), ((),)))
    if argument(op, 5, "label_smoothing", 0.0) or spatial:
        return tokens
    classes = AxisStrategy("classes", (shard(1), INVARIANT), (INVARIANT,), splits_work=True)
    return (*tokens, classes)


def token_loss(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Cross entropy of logits[.. c], target[..] over all leading dims, as of `cross_entropy`."""
    logits, target = input_metas(op, values)
    tokens = dim_labels(len(target.shape), prefix="tokens")
    if argument(op, 3, "reduction", MEAN) != MEAN or target.is_floating:
        return ()
    by_token = split_each(Labels(((*tokens, None), tokens), ((),)))
    if argument(op, 5, "label_smoothing", 0.0):
        return by_token
    last = len(logits.shape) - 1
    return (*by_token, AxisStrategy("classes", (shard(last), INVARIANT), (INVARIANT,), splits_work=True))


def gather_rows(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """gather(x, dim, index) with equal leading sizes: dims other than `dim` where both have the same size."""
    source, index = (meta.shape for meta in input_metas(op, values))
    dim = normal_dim(integer(op, 1, "dim", 0), len(source))
    labels = tuple(
        f"dim{i}" if i != dim and a == b else None for i, (a, b) in enumerate(zip(source, index, strict=True))
    )
    return split_each(Labels((labels, labels), (labels,)))
