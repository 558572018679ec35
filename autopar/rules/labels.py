"""Dimension labels: the one mechanism from which nearly every strategy follows.

Each dim of each operand and result gets a label or none. Splitting a label over an axis shards every tensor that
carries it, on that dim. What happens to the others follows from the calculus of `ir.placement`:

- a result without the label is `Partial`: the label is summed over (contraction),
- an operand without the label is `Replicate` if the results carry it (its gradient is summed over the ranks),
  and `Partial` if they do not (a bias under a contraction must be added once).

So a rule is nothing but the labels, e.g. linear: x[a k], w[n k], b[n] -> y[a n].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, Placement, shard
from autopar.ir.strategy import AxisStrategy

Dims: TypeAlias = tuple[str | None, ...]
"""Label of each dim of one tensor; None cannot be split."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of all operands and results of one op."""

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]

    def names(self) -> tuple[str, ...]:
        """Distinct labels in order of appearance."""
        every = (label for dims in (*self.outputs, *self.inputs) for label in dims)
        return tuple(dict.fromkeys(label for label in every if label is not None))


def split(labels: Labels, name: str, shown_as: str | None = None) -> AxisStrategy:
    """Strategy that splits one label over an axis."""
    in_results = any(name in dims for dims in labels.outputs)
    without = REPLICATE if in_results else PARTIAL
    return AxisStrategy(
        shown_as or name,
        tuple(_placement(dims, name, without) for dims in labels.inputs),
        tuple(_placement(dims, name, PARTIAL) for dims in labels.outputs),
        splits_work=True,
    )


def split_each(labels: Labels, names: Iterable[str] | None = None) -> tuple[AxisStrategy, ...]:
    """One strategy per label (all labels by default)."""
    return tuple(split(labels, name) for name in (labels.names() if names is None else names))


def replicate(num_inputs: int, num_outputs: int) -> AxisStrategy:
    """Every rank does the whole op; values and gradients are whole everywhere."""
    return AxisStrategy("replicate", (INVARIANT,) * num_inputs, (INVARIANT,) * num_outputs, splits_work=False)


def partial(num_inputs: int, num_outputs: int) -> AxisStrategy:
    """A linear op on pending sums: every operand and result is a term."""
    return AxisStrategy("partial", (PARTIAL,) * num_inputs, (PARTIAL,) * num_outputs, splits_work=False)


def dim_labels(num_dims: int, except_dims: Iterable[int] = (), prefix: str = "dim") -> Dims:
    """`dim0, dim1, ...` with None at the excepted dims."""
    excepted = set(except_dims)
    return tuple(None if i in excepted else f"{prefix}{i}" for i in range(num_dims))


def broadcast_labels(shape: Sequence[int], result_shape: Sequence[int], result: Dims) -> Dims:
    """Labels of an operand that is broadcast to the result: none where its size is 1 or differs."""
    offset = len(result_shape) - len(shape)
    return tuple(
        result[i + offset] if size == result_shape[i + offset] and size != 1 else None for i, size in enumerate(shape)
    )


def _placement(dims: Dims, name: str, without: Placement) -> Placement:
    return shard(dims.index(name)) if name in dims else without
