"""Which layers of a model are alike, so that the trace of one tells those of the others.

Children of one module are alike if they have the same class, the same modules below them, parameters and buffers of
the same shapes, dtypes and `requires_grad`, and equal attributes. Attributes that are objects count as equal only if
they are one object. Layers that share a tensor or a module with anything else are never alike.

An integer that is another one in every layer, like `layer_idx`, may be the layer's number. It does not make layers
differ, but tracing must show that nobody reads it (`Repeat.numbers`).
"""

from __future__ import annotations

import enum
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

MIN_ALIKE = 5
"""Three layers of each kind are traced; from five on that spares something."""

Place: TypeAlias = tuple[str, str]
"""Module path inside a layer, and attribute."""

_PLAIN = (bool, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.layout,
          torch.memory_format, enum.Enum, types.BuiltinFunctionType)  # fmt: skip
_OWN_TREE = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Repeat:
    """Layers that are alike.

    Attributes:
        paths: module path of each, in the order of registration.
        numbers: integer attributes that differ from layer to layer and must not be read.
    """

    paths: tuple[str, ...]
    numbers: tuple[Place, ...]


@dataclass(frozen=True)
class Description:
    """All that can make a layer behave differently from another, apart from the values of its tensors.

    Attributes:
        rest: everything but the integers.
        integers: plain integer attributes.
    """

    rest: tuple[object, ...]
    integers: tuple[tuple[Place, int], ...]


def find_repeats(module: torch.nn.Module, min_alike: int = MIN_ALIKE) -> tuple[Repeat, ...]:
    """Groups of at least `min_alike` alike layers, outermost ones only, in the order of registration."""
    homes = Counter(id(part) for part in _parts(module))
    return tuple(_below(module, "", homes, min_alike))


def _parts(module: torch.nn.Module) -> Iterator[object]:
    """Modules and tensors, once for each place where they are registered."""
    for _, owner in module.named_modules(remove_duplicate=False):
        yield owner
        yield from (tensor for tensor in _tensors(owner).values() if tensor is not None)


def _tensors(owner: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {**owner._parameters, **owner._buffers}


def _below(module: torch.nn.Module, path: str, homes: Mapping[int, int], min_alike: int) -> Iterator[Repeat]:
    children = {name: child for name, child in module._modules.items() if child is not None}
    grouped: set[str] = set()
    if len(children) >= min_alike:
        for repeat in _alike(children, homes, min_alike):
            grouped.update(repeat.paths)
            yield Repeat(tuple(_join(path, name) for name in repeat.paths), repeat.numbers)
    for name, child in children.items():
        if name not in grouped and homes[id(child)] == 1:
            yield from _below(child, _join(path, name), homes, min_alike)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _alike(children: Mapping[str, torch.nn.Module], homes: Mapping[int, int], min_alike: int) -> Iterator[Repeat]:
    by_rest: dict[tuple[object, ...], dict[str, dict[Place, int]]] = {}
    for name, child in children.items():
        if _is_worth_it(child) and all(homes[id(part)] == 1 for part in _parts(child)):
            described = describe(child)
            by_rest.setdefault(described.rest, {})[name] = dict(described.integers)
    for layers in by_rest.values():
        places = next(iter(layers.values()))
        numbers = tuple(p for p in places if len({integers[p] for integers in layers.values()}) == len(layers) > 1)
        by_integers: dict[tuple[int, ...], list[str]] = {}
        for name, integers in layers.items():
            key = tuple(value for place, value in integers.items() if place not in numbers)
            by_integers.setdefault(key, []).append(name)
        for names in by_integers.values():
            if len(names) >= min_alike:
                yield Repeat(tuple(names), numbers)


def _is_worth_it(layer: torch.nn.Module) -> bool:
    """A layer of torch itself, like `Linear`, is one op and costs as much to stand in for as to trace."""
    is_own = not type(layer).__module__.startswith("torch.nn")
    return (is_own or any(True for _ in layer.children())) and any(True for _ in layer.parameters())


def describe(layer: torch.nn.Module) -> Description:
    """See `Description`; hashable, comparable, independent of the layer's place in the model."""
    rest: list[object] = []
    integers: list[tuple[Place, int]] = []
    for path, owner in layer.named_modules(remove_duplicate=False):
        rest.append((path, type(owner)))
        rest.extend((path, name, _describe_tensor(tensor)) for name, tensor in _tensors(owner).items())
        rest.append((path, tuple(owner._parameters), tuple(owner._modules)))
        for name, value in sorted(vars(owner).items()):
            if type(value) is int:
                integers.append(((path, name), value))
            elif name not in _OWN_TREE:
                rest.append((path, name, _describe_value(value)))
    places = tuple(place for place, _ in integers)
    return Description((*rest, places), tuple(integers))


def _describe_tensor(tensor: torch.Tensor | None) -> object:
    if tensor is None:
        return None
    return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _describe_value(value: Any) -> object:
    if type(value) is int or isinstance(value, _PLAIN):
        return type(value), repr(value) if isinstance(value, float | complex) else value
    if type(value) in (tuple, list, torch.Size):
        return type(value), tuple(_describe_value(item) for item in value)
    if isinstance(value, dict):
        items = tuple((_describe_value(key), _describe_value(item)) for key, item in value.items())
        return type(value), items
    if type(value) in (set, frozenset):
        return type(value), frozenset(_describe_value(item) for item in value)
    return "one object", id(value)


def describe_objects(layers: Sequence[torch.nn.Module]) -> object:
    """Attributes of the objects that the layers' modules hold, to see whether any of them changes."""
    held = (value for layer in layers for owner in layer.modules() for value in vars(owner).values())
    objects = {id(value): value for value in held if hasattr(value, "__dict__") and not callable(value)}
    return [
        (key, [(name, _describe_value(value)) for name, value in sorted(vars(found).items())])
        for key, found in objects.items()
        if not isinstance(found, type | types.ModuleType)
    ]
