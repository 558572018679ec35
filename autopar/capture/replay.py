"""Running calls on meta tensors, once per distinct call.

What a call does to shapes, strides, dtypes, gradients, memory and FLOPs depends on those of its operands and on its
constants alone. `MetaRunner` therefore runs the first of each kind by torch, and answers for the others from memory.
Tensors stand as `Held` values meanwhile, which cost neither a tensor nor a storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from autopar import torch_adapter
from autopar.capture import saved
from autopar.capture.calls import map_refs, refs_in
from autopar.capture.flops import count_flops


class Layout(NamedTuple):
    """All of a tensor but its values and the identity of its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    requires_grad: bool
    storage_bytes: int


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the trace; tensors with one `storage` share memory."""

    layout: Layout
    storage: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def requires_grad(self) -> bool:
        return self.layout.requires_grad

    def detach(self) -> Held:
        return Held(self.layout._replace(requires_grad=False), self.storage)


@dataclass(frozen=True, slots=True)
class _Effect:
    """What a call does, with storages numbered: those of the operands in order of appearance, then new ones.

    Attributes:
        packed: storage kept for backward -> bytes.
        flops: forward and backward.
    """

    results: tuple[tuple[Layout, int], ...]
    packed: tuple[tuple[int, int], ...]
    num_storages: int
    extra_bytes: int
    flops: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call's results; storages kept for backward with their bytes; bytes kept that none of the run stands for."""

    results: tuple[Held, ...]
    packed: dict[int, int]
    extra_bytes: int
    flops: tuple[int, int]


class MetaRunner:
    """Runs calls and numbers storages; see the module docstring."""

    def __init__(self) -> None:
        self._effects: dict[object, _Effect] = {}
        self._num_storages = 0

    def hold(self, tensor: torch.Tensor) -> Held:
        """A tensor from outside, in memory of its own."""
        return Held(_layout(tensor), self._new_storage())

    def run(self, target: Any, args: Any, kwargs: dict[str, Any], tensors: dict[str, Held]) -> Outcome:
        """One call with gradients enabled. Raises what torch raises."""
        operands = [tensors[name] for name in refs_in(args, kwargs)]
        storages: dict[int, int] = {}
        for held in operands:
            storages.setdefault(held.storage, len(storages))
        constants = map_refs(lambda _: ..., (args, kwargs))
        layouts = tuple((held.layout, storages[held.storage]) for held in operands)
        key = (target, layouts, repr(constants))
        effect = self._effects.get(key)
        if effect is None:
            effect = _execute(target, args, kwargs, layouts)
            self._effects[key] = effect
        numbers = [*storages, *(self._new_storage() for _ in range(effect.num_storages - len(storages)))]
        return Outcome(
            tuple(Held(layout, numbers[storage]) for layout, storage in effect.results),
            {numbers[storage]: num_bytes for storage, num_bytes in effect.packed},
            effect.extra_bytes,
            effect.flops,
        )

    def _new_storage(self) -> int:
        self._num_storages += 1
        return self._num_storages


def _layout(tensor: torch.Tensor) -> Layout:
    num_bytes = tensor.untyped_storage().nbytes()
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    return Layout(shape, stride, offset, tensor.dtype, tensor.requires_grad, num_bytes)


def _execute(target: Any, args: Any, kwargs: dict[str, Any], layouts: tuple[tuple[Layout, int], ...]) -> _Effect:
    """Run the call on meta tensors made for it."""
    operands = _materialise(layouts)
    waiting = iter(operands)
    args = _on_meta(map_refs(lambda _: next(waiting), args))
    kwargs = {key: _on_meta(map_refs(lambda _: next(waiting), argument)) for key, argument in kwargs.items()}
    numbers: dict[int, int] = {}
    for operand in operands:
        numbers.setdefault(torch_adapter.storage_key(operand), len(numbers))
    result, packed, extra_bytes = saved.run_and_record(target, args, kwargs)
    results = (result,) if isinstance(result, torch.Tensor) else tuple(result or ())
    flops = count_flops(torch_adapter.target_name(target), args, kwargs, results)
    keys = [torch_adapter.storage_key(tensor) for tensor in results]
    for key in (*keys, *packed):
        numbers.setdefault(key, len(numbers))
    return _Effect(
        tuple((_layout(tensor), numbers[key]) for tensor, key in zip(results, keys, strict=True)),
        tuple((numbers[key], num_bytes) for key, num_bytes in packed.items()),
        len(numbers),
        extra_bytes,
        flops,
    )


def _materialise(layouts: tuple[tuple[Layout, int], ...]) -> list[torch.Tensor]:
    """Meta tensors of these layouts, sharing memory as numbered."""
    storages: dict[int, torch.UntypedStorage] = {}
    made: dict[tuple[Layout, int], torch.Tensor] = {}
    for layout, number in layouts:
        if number not in storages:
            bytes_ = torch.empty(layout.storage_bytes, dtype=torch.uint8, device="meta")
            storages[number] = bytes_.untyped_storage()
        if (layout, number) not in made:
            storage = storages[number]
            empty = torch.empty(0, dtype=layout.dtype, device="meta")
            tensor = empty.set_(storage, layout.offset, layout.shape, layout.stride)
            made[layout, number] = tensor.requires_grad_(layout.requires_grad)
    return [made[layout, number] for layout, number in layouts]


def _on_meta(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        return torch.device("meta")
    if isinstance(argument, tuple):
        return [_on_meta(part) for part in argument]
    return argument
