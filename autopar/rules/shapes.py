"""Rules of ops that only move or select elements: views, permutations, slices, concatenation, padding."""

from __future__ import annotations

from collections.abc import Iterable

from autopar.ir.graph import Op
from autopar.ir.strategy import AxisStrategy
from autopar.rules.call import Values, input_metas, integer, integers, normal_dim, output_metas
from autopar.rules.labels import Labels, broadcast_labels, dim_labels, partial, split_each


def view(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Reshape: in each group of dims that merge or split, the leading dim carries the split."""
    source = input_metas(op, values)[0].shape
    target = output_metas(op, values)[0].shape
    before: list[str | None] = [None] * len(source)
    after: list[str | None] = [None] * len(target)
    for from_dims, to_dims in _groups(source, target):
        before[from_dims[0]] = after[to_dims[0]] = f"dim{to_dims[0]}"
    return (*split_each(Labels((tuple(before),), (tuple(after),))), partial(1, 1))


def _groups(source: tuple[int, ...], target: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """Minimal runs of dims with equal products, sizes of 1 left out."""
    left = [i for i, size in enumerate(source) if size != 1]
    right = [i for i, size in enumerate(target) if size != 1]
    while left and right:
        from_dims, to_dims = [left.pop(0)], [right.pop(0)]
        have, want = source[from_dims[0]], target[to_dims[0]]
        while have != want:
            if have < want:
                from_dims.append(left.pop(0))
                have *= source[from_dims[-1]]
            else:
                to_dims.append(right.pop(0))
                want *= target[to_dims[-1]]
        yield from_dims, to_dims


def permutation(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """transpose, t, permute: labels move with their dims."""
    num_dims = len(input_metas(op, values)[0].shape)
    order = list(range(num_dims))
    if op.target.startswith("aten.permute"):
        order = [normal_dim(d, num_dims) for d in integers(op, 1, "dims") or ()]
    elif op.target.startswith("aten.transpose"):
        first, second = (normal_dim(integer(op, i, f"dim{i - 1}", 0), num_dims) for i in (1, 2))
        order[first], order[second] = second, first
    else:
        order.reverse()
    before = dim_labels(num_dims)
    return (*split_each(Labels((before,), (tuple(before[i] for i in order),))), partial(1, 1))


def expand(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """Broadcast: dims that grow split in the result alone (the operand's gradient is then summed)."""
    source = input_metas(op, values)[0].shape
    target = output_metas(op, values)[0].shape
    after = tuple(None if size == 1 else label for size, label in zip(target, dim_labels(len(target)), strict=True))
    return (*split_each(Labels((broadcast_labels(source, target, after),), (after,))), partial(1, 1))


def along_dim(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """slice, select, split, chunk, unbind, narrow: every dim but the one they cut (a full slice cuts none)."""
    shape = input_metas(op, values)[0].shape
    position = 2 if op.target.startswith(("aten.split", "aten.chunk")) else 1
    cut = normal_dim(integer(op, position, "dim", 0), len(shape))
    outputs = output_metas(op, values)
    is_whole = all(meta.shape == shape for meta in outputs)
    before = dim_labels(len(shape), () if is_whole else (cut,))
    drops = len(outputs[0].shape) < len(shape)
    after = tuple(label for i, label in enumerate(before) if not (drops and i == cut))
    return (*split_each(Labels((before,), (after,) * len(outputs))), partial(1, len(outputs)))


def concatenate(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """cat: every dim but the joined one; stack: every dim of the operands."""
    metas = input_metas(op, values)
    result = output_metas(op, values)[0].shape
    joined = normal_dim(integer(op, 1, "dim", 0), len(result))
    after = dim_labels(len(result), (joined,))
    is_stack = op.target.startswith("aten.stack")
    before = tuple(label for i, label in enumerate(after) if not (is_stack and i == joined))
    return (*split_each(Labels((before,) * len(metas), (after,))), partial(len(metas), 1))


def unchanged_dims(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """pad, repeat, pooling, interpolation and the like: dims whose size stays, among the leading two or unpadded."""
    source = input_metas(op, values)[0].shape
    target = output_metas(op, values)[0].shape
    if len(source) != len(target):
        return ()
    changed = {i for i, (a, b) in enumerate(zip(source, target, strict=True)) if a != b}
    if op.target.startswith(("aten.pad", "aten.constant_pad", "aten.roll", "aten.flip", "aten.repeat")):
        changed |= _touched(op, len(source))
    else:
        changed |= set(range(2, len(source)))
    labels = dim_labels(len(source), changed)
    return split_each(Labels((labels,), (labels,) * len(op.outputs)))


def _touched(op: Op, num_dims: int) -> set[int]:
    """Dims that pad, roll or flip act on."""
    numbers = integers(op, 1, "pad") or ()
    if op.target.startswith(("aten.pad", "aten.constant_pad")):
        pairs = [any(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
        return {num_dims - 1 - i for i, is_padded in enumerate(pairs) if is_padded}
    if op.target.startswith("aten.repeat"):
        return {i for i, count in enumerate(numbers) if count != 1}
    dims = integers(op, 2, "dims") if op.target.startswith("aten.roll") else numbers
    return {normal_dim(d, num_dims) for d in dims or range(num_dims)}
