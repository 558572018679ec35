"""Optimizer states that lie outside of the device, and come to it for the update, one shard after the other.

A shard is a group of the optimizer's: `step` brings its states, lets the optimizer update this group alone, and puts
them back. So the same kernels update the same numbers as without offload. Copies that the optimizer updates in place of
narrower parameters (masters) lie there too: on the device they have no memory between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autopar.ir.offload import SHARD_BYTES
from autopar.runtime.parameters import ParameterStore, StoredParameter
from autopar.runtime.places import Place

STATES: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""Names, in torch's optimizers, of states as large as their parameter."""
MASTER = "master"


class OffloadedStates:
    """States of one rank's parameters; see the module docstring."""

    def __init__(self, store: ParameterStore, kind: str, place: Place) -> None:
        """Take room for everything, and move the masters there.

        Raises:
            InputError: there is no room.
        """
        self._store, self._place = store, place
        items = [item for item in store.items.values() if item.value.requires_grad]
        self._homes = {id(item.updated): self._home(item, STATES[kind]) for item in items}
        self._shards = _shards(items, len(STATES[kind]))
        for item in items:
            if MASTER in self._homes[id(item.updated)]:
                self._put_master(item)

    def _home(self, item: StoredParameter, names: Sequence[str]) -> dict[str, Tensor]:
        wanted = (*names, MASTER) if has_master(item) else names
        updated = item.updated
        return {name: _typed(self._place.take(max(1, _bytes(updated))), updated) for name in wanted}

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each shard: groups of the optimizer, in this order."""
        return [[item.updated for item in shard] for shard in self._shards]

    @property
    def has_masters(self) -> bool:
        """Some parameter has no memory on the device between two steps."""
        return any(MASTER in home for home in self._homes.values())

    def state(self, parameter: nn.Parameter, name: str) -> Tensor | None:
        """Where a state of a parameter lies; None for one that stays on the device."""
        return self._homes.get(id(parameter), {}).get(name)

    def value(self, item: StoredParameter) -> Tensor:
        """What the optimizer updates, wherever it lies."""
        found = self.state(item.updated, MASTER)
        return item.updated.detach() if found is None else found

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update everything, shard by shard, and the leaves after it."""
        groups, parts = optimizer.param_groups, dict[str, Tensor]()
        try:
            for shard, group in zip(self._shards, groups, strict=True):
                given = [item for item in shard if item.updated.grad is not None or has_master(item)]
                for item in given:
                    self._bring(item, optimizer)
                optimizer.param_groups = [group]
                optimizer.step()
                for item in given:
                    parts |= self._store.settle(item)
                    self._put(item, optimizer)
        finally:
            optimizer.param_groups = groups
        self._wait()
        self._store.gather_parts(parts)

    def refresh_leaves(self) -> None:
        """After the states have been loaded: the leaves follow."""
        parts = dict[str, Tensor]()
        for shard in self._shards:
            for item in shard:
                self._bring_master(item)
                parts |= self._store.settle(item)
                self._drop_master(item)
        self._store.gather_parts(parts)

    def _bring(self, item: StoredParameter, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.state[item.updated]
        for name, home in self._homes[id(item.updated)].items():
            if name in state:
                state[name] = torch.empty_like(home, device=item.updated.device, pin_memory=False)
                state[name].copy_(home, non_blocking=True)
                self._place.leave(home)
        self._bring_master(item)

    def _put(self, item: StoredParameter, optimizer: torch.optim.Optimizer) -> None:
        state = optimizer.state[item.updated]
        for name, home in self._homes[id(item.updated)].items():
            if name in state:
                home.copy_(state[name], non_blocking=True)
                state[name] = home
                self._place.leave(home)
        if self.state(item.updated, MASTER) is not None:
            self._put_master(item)

    def _bring_master(self, item: StoredParameter) -> None:
        home = self.state(item.updated, MASTER)
        if home is not None:
            item.updated.untyped_storage().resize_(_bytes(item.updated))
            item.updated.detach().copy_(home, non_blocking=True)

    def _put_master(self, item: StoredParameter) -> None:
        home = self.state(item.updated, MASTER)
        assert home is not None
        home.copy_(item.updated.detach(), non_blocking=True)
        self._place.leave(home)
        self._drop_master(item)

    def _drop_master(self, item: StoredParameter) -> None:
        if self.state(item.updated, MASTER) is not None:
            item.updated.untyped_storage().resize_(0)

    def _wait(self) -> None:
        """Until everything is where it belongs: others read it there."""
        if self._store.device != "cpu":
            torch.cuda.current_stream(self._store.device).synchronize()


def has_master(item: StoredParameter) -> bool:
    """The optimizer updates a copy of its own."""
    return item.updated.dtype != item.leaf.dtype


def _shards(items: Sequence[StoredParameter], num_states: int) -> list[list[StoredParameter]]:
    """Neighbours whose states take SHARD_BYTES at most, or a single one."""
    found: list[list[StoredParameter]] = []
    size = math.inf
    for item in items:
        own = (num_states + has_master(item)) * _bytes(item.updated)
        if size + own > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(item)
        size += own
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _typed(raw: Tensor, like: Tensor) -> Tensor:
    """Bytes as a tensor of the same shape and dtype, its elements in order."""
    found: Tensor = raw[: _bytes(like)].view(like.dtype).view(like.shape)
    return found
