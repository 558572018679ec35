"""Reading an `Op`'s call: arguments by position or keyword, and which input stands where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from autopar.ir.graph import Arg, Op, Ref, Value
from autopar.ir.tensor import TensorMeta

Values: TypeAlias = Mapping[str, Value]


def argument(op: Op, position: int, name: str, default: Arg = None) -> Arg:
    """Argument given by position or by keyword, else the default."""
    return op.args[position] if position < len(op.args) else op.kwargs.get(name, default)


def input_index(op: Op, position: int, name: str = "") -> int | None:
    """Index into `op.inputs` of the tensor at an argument position, or None where there is no tensor."""
    found = argument(op, position, name)
    return found.index if isinstance(found, Ref) else None


def integer(op: Op, position: int, name: str, default: int) -> int:
    """An int argument. Raises TypeError for anything else."""
    found = argument(op, position, name, default)
    if not isinstance(found, int):
        raise TypeError(f"{op.target}: argument {name!r} is {found!r}, expected an int")
    return found


def integers(op: Op, position: int, name: str) -> tuple[int, ...] | None:
    """A list-of-int argument (or one int), or None where absent."""
    found = argument(op, position, name)
    if found is None:
        return None
    items = found if isinstance(found, tuple) else (found,)
    return tuple(item for item in items if isinstance(item, int))


def input_metas(op: Op, values: Values) -> tuple[TensorMeta, ...]:
    return tuple(values[name].meta for name in op.inputs)


def output_metas(op: Op, values: Values) -> tuple[TensorMeta, ...]:
    return tuple(values[name].meta for name in op.outputs)


def normal_dim(dim: int, num_dims: int) -> int:
    """Non-negative form of a possibly negative dim."""
    return dim % num_dims if num_dims else 0
