"""Rules of ops that multiply and sum: linear, matmul family, convolutions, attention, embedding."""

from __future__ import annotations

from autopar.ir.graph import Op
from autopar.ir.placement import INVARIANT, PARTIAL, shard
from autopar.ir.strategy import AxisStrategy
from autopar.rules.call import Values, argument, input_index, input_metas, integer, output_metas
from autopar.rules.labels import Dims, Labels, dim_labels, split_each

CONTEXT = "context"
"""Label of attention whose rows are split while every rank has all keys, with a trade of rows inside the op."""


def linear(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """x[.. k], w[n k], b[n] -> y[.. n]."""
    metas = input_metas(op, values)
    leading = dim_labels(len(metas[0].shape) - 1)
    inputs: list[Dims] = [(*leading, "contract"), ("columns", "contract")]
    if len(metas) == 3:
        inputs.append(("columns",))
    return split_each(Labels(tuple(inputs), ((*leading, "columns"),)))


def mm(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """a[m k], b[k n] -> y[m n]."""
    return split_each(Labels((("dim0", "contract"), ("contract", "columns")), (("dim0", "columns"),)))


def addmm(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Bias c (broadcast to [m n]), a[m k], b[k n] -> y[m n], with beta = alpha = 1 or constants."""
    result: Dims = ("dim0", "columns")
    shape = input_metas(op, values)[0].shape
    sizes = output_metas(op, values)[0].shape
    offset = 2 - len(shape)
    bias = tuple(result[i + offset] if size == sizes[i + offset] else None for i, size in enumerate(shape))
    return split_each(Labels((bias, ("dim0", "contract"), ("contract", "columns")), (result,)))


def bmm(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """a[b m k], b[b k n] -> y[b m n]."""
    labels = Labels((("dim0", "dim1", "contract"), ("dim0", "contract", "columns")), (("dim0", "dim1", "columns"),))
    return split_each(labels)


def matmul(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """a[.. m k], b[.. k n] -> y[.. m n] with broadcast leading dims; operands of at least two dims."""
    first, second = (meta.shape for meta in input_metas(op, values))
    if min(len(first), len(second)) < 2:
        return ()
    result_shape = output_metas(op, values)[0].shape
    lead = dim_labels(len(result_shape) - 2)

    def leading(shape: tuple[int, ...]) -> Dims:
        offset = len(lead) - (len(shape) - 2)
        return tuple(lead[i + offset] if size != 1 else None for i, size in enumerate(shape[:-2]))

    rows = f"dim{len(result_shape) - 2}"
    labels = Labels(
        ((*leading(first), rows, "contract"), (*leading(second), "contract", "columns")), ((*lead, rows, "columns"),)
    )
    return split_each(labels)


def convolution(op: Op, values: Values, *, transposed: bool = False) -> tuple[AxisStrategy, ...]:
    """x[n c ..], w[o c ..] (transposed: w[c o ..]), b[o] -> y[n o ..]; grouped: the batch only."""
    metas = input_metas(op, values)
    groups = integer(op, 6, "groups", 1)
    spatial: Dims = (None,) * (len(metas[0].shape) - 2)
    plain = groups == 1
    channels, columns = ("contract", "columns") if plain else (None, None)
    weight = (channels, columns) if transposed else (columns, channels)
    inputs: list[Dims] = [("dim0", channels, *spatial), (*weight, *spatial)]
    if len(metas) == 3:
        inputs.append((columns,))
    return split_each(Labels(tuple(inputs), (("dim0", columns, *spatial),)))


def transposed_convolution(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """See `convolution`."""
    return convolution(op, values, transposed=True)


def attention(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """q[b h l e], k[b h s e], v[b h s f], mask[.. l s] -> y[b h l f]; keys and values stay whole when rows split.

    Rows of causal attention, where l = s, are cut into runs (`context`, `autopar.causal_attention`). The last run sees
    the most keys, so ranks trade half of their rows inside the op and all do the same work. With grouped queries the
    heads of k and v split alike: consecutive query heads share a head of k.
    """
    metas = input_metas(op, values)
    if len(metas[0].shape) != 4:
        return ()
    rows: str | None = "dim2"
    if argument(op, 5, "is_causal", False):
        is_plain = metas[0].shape[2] == metas[1].shape[2] and not argument(op, 4, "dropout_p", 0.0)
        rows = CONTEXT if is_plain else None
    inputs: list[Dims] = [("dim0", "dim1", rows, None), ("dim0", "dim1", None, None), ("dim0", "dim1", None, None)]
    if input_index(op, 3, "attn_mask") is not None:
        mask = metas[3].shape
        full: Dims = ("dim0", "dim1", rows, None)
        inputs.append(tuple(None if size == 1 else full[i + 4 - len(mask)] for i, size in enumerate(mask)))
    return split_each(Labels(tuple(inputs), (("dim0", "dim1", rows, None),)))


def embedding(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """table[v d], ids[..] -> y[.. d]; rows: ids whole, ids of other ranks give zero, result partial."""
    num_dims = len(values[op.inputs[1]].meta.shape)
    ids = dim_labels(num_dims)
    by_label = split_each(Labels(((None, "columns"), ids), ((*ids, "columns"),)))
    rows = AxisStrategy("rows", (shard(0), INVARIANT), (PARTIAL,), splits_work=True)
    return (*by_label, rows)
