"""Calls on their way from the exported program to the graph: `Call` as exported, `Traced` functional and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from autopar import torch_adapter

Frames: TypeAlias = tuple[tuple[str, int], ...]
"""(file, line) of the Python stack, outermost first."""


@dataclass(frozen=True, slots=True)
class ValueRef:
    """A tensor argument of a call."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """One operator call, before functionalisation.

    Attributes:
        target: the OpOverload.
        args, kwargs: nested tuples with `ValueRef`s for tensors.
        num_outputs: 0 for none, -1 for a single tensor, else the length of the tuple or list returned.
        grad_enabled: false inside `torch.no_grad()`.
        scope: raw module path, with `@n` marks for the n-th further call of a module.
        frames: (file, line) of the Python stack, outermost first.
    """

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_outputs: int
    grad_enabled: bool
    scope: str
    frames: Frames

    @property
    def target_name(self) -> str:
        return torch_adapter.target_name(self.target)

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.num_outputs < 0:
            return (self.name,)
        return tuple(f"{self.name}:{i}" for i in range(self.num_outputs))


@dataclass
class Traced:
    """A functional call and what was learnt from running it; becomes an `ir.graph.Op`."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    scope: str
    frames: Frames
    mutates: tuple[str, ...] = ()
    flops_forward: int = 0
    flops_backward: int = 0
    packed: dict[int, int] = field(default_factory=dict)
    extra_bytes: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        return refs_in(self.args, self.kwargs)


def map_refs(function: Callable[[ValueRef], Any], args: Any) -> Any:
    """Replace every `ValueRef` in nested tuples, lists and dicts; lists become tuples."""
    kind = type(args)
    if kind is ValueRef:
        return function(args)
    if kind in _SCALARS:
        return args
    if isinstance(args, tuple | list):
        return tuple([map_refs(function, arg) for arg in args])
    if isinstance(args, dict):
        return {key: map_refs(function, arg) for key, arg in args.items()}
    return args


_SCALARS = frozenset((int, float, bool, str, type(None)))


def refs_in(*args: Any) -> tuple[str, ...]:
    """Names of the values read, in order of appearance, one entry per appearance."""
    found: list[str] = []
    waiting: list[Any] = [*reversed(args)]
    while waiting:
        argument = waiting.pop()
        if type(argument) is ValueRef:
            found.append(argument.name)
        elif isinstance(argument, tuple | list):
            waiting.extend(reversed(argument))
        elif isinstance(argument, dict):
            waiting.extend(reversed(argument.values()))
    return tuple(found)
