"""The admissible strategies of an op, and the local shapes that a strategy leaves.

What holds for every strategy given out here: run on any mesh, with redistributions that meet its placements, the op
computes the serial values and gradients. A property test runs each one sharded and whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from autopar.ir.graph import Op
from autopar.ir.placement import REPLICATE, Sharding, local_shape
from autopar.ir.strategy import AxisStrategy, Strategy, input_sharding, output_sharding
from autopar.ir.tensor import TensorMeta
from autopar.rules.call import Values
from autopar.rules.labels import replicate
from autopar.rules.table import Family, family_of, packet

FOLLOW = "follow"
"""Strategy of an op on a parameter alone: it stays `Replicate`, and its gradient is summed at the end."""


@lru_cache(maxsize=4096)
def _family(target: str) -> Family | None:
    return family_of(target)


def has_rule(target: str) -> bool:
    """Whether the table knows the op."""
    return _family(target) is not None


def axis_strategies(op: Op, values: Values, axis_size: int | None = None) -> tuple[AxisStrategy, ...]:
    """Strategies of one op on one mesh axis; the first is always `replicate`.

    Args:
        op: the op, with global shapes in `values`.
        values: the graph's values.
        axis_size: if given, strategies that do not divide evenly over that many ranks are left out.
    """
    everything = [replicate(len(op.inputs), len(op.outputs)), *_by_rule(op, values)]
    if axis_size is None:
        return tuple(everything)
    return tuple(s for s in everything if local_metas(op, (s,), (axis_size,), values) is not None)


def _by_rule(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    family = _family(op.target)
    if family is None or (op.mutates and packet(op.target) != "batch_norm"):
        return ()
    strategies = (*_of_parameter(op, values), *family(op, values))
    return tuple(s for s in strategies if s.label != "partial" or _keeps_sums(op, values))


def _of_parameter(op: Op, values: Values) -> tuple[AxisStrategy, ...]:
    """A parameter that is only transposed, cast or viewed may stay `Replicate`: its gradient is summed at the end."""
    if len(op.inputs) != 1 or values[op.inputs[0]].origin != "parameter":
        return ()
    return (AxisStrategy(FOLLOW, (REPLICATE,), (REPLICATE,) * len(op.outputs), splits_work=False),)


def _keeps_sums(op: Op, values: Values) -> bool:
    """A cast to or from integers is not linear, and sums of masks are never pending."""
    return all(values[name].meta.is_floating for name in (*op.inputs, *op.outputs))


def local_metas(
    op: Op, strategy: Strategy, axis_sizes: Sequence[int], values: Values
) -> tuple[tuple[TensorMeta, ...], tuple[TensorMeta, ...]] | None:
    """Local inputs and outputs under a strategy, or None where something does not divide evenly."""
    inputs = [_local(values[name].meta, input_sharding(strategy, i), axis_sizes) for i, name in enumerate(op.inputs)]
    outputs = [_local(values[name].meta, output_sharding(strategy, i), axis_sizes) for i, name in enumerate(op.outputs)]
    found = [meta for meta in inputs if meta is not None], [meta for meta in outputs if meta is not None]
    if len(found[0]) < len(inputs) or len(found[1]) < len(outputs):
        return None
    return tuple(found[0]), tuple(found[1])


def _local(meta: TensorMeta, sharding: Sharding, axis_sizes: Sequence[int]) -> TensorMeta | None:
    shape = local_shape(meta.shape, sharding, axis_sizes)
    return None if shape is None else meta.with_shape(shape)
