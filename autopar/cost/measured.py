"""Measured op times in place of modelled ones, where the profile has the very op at its local shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from autopar.cost.pricing import NodePrice
from autopar.ir.cost import Array
from autopar.ir.graph import Op, Value
from autopar.ir.profile import OpProfile, ProfileKey
from autopar.ir.strategy import Strategy
from autopar.rules.local_call import local_call
from autopar.rules.strategies import local_metas


class OpLookup(Protocol):
    """What the cost model needs of a profile store."""

    @property
    def device(self) -> str:
        """Device that the rows were measured on."""

    def has_target(self, target: str) -> bool:
        """Whether any row is of this op; spares making keys."""

    def find(self, key: ProfileKey) -> OpProfile | None:
        """The row, if the op was measured."""


def local_key(
    op: Op, strategy: Strategy, sizes: Sequence[int], values: Mapping[str, Value], device: str
) -> ProfileKey | None:
    """Key of the call that one rank makes, or None for split-aware calls that are no torch op."""
    metas = local_metas(op, strategy, sizes, values)
    if metas is None or op.members:
        return None
    call = local_call(op, strategy, sizes, values)
    if call.target != op.target:
        return None
    return ProfileKey(op.target, metas[0], call.args, tuple(sorted(call.kwargs.items())), device)


def apply_profile(
    profile: OpLookup,
    op: Op,
    *,
    strategies: Sequence[Strategy],
    sizes: Sequence[int],
    values: Mapping[str, Value],
    price: NodePrice,
    adding_s: Array,
) -> int:
    """Overwrites times (and energy, where a counter was read) of measured choices. Returns how many there were.

    To backward come `adding_s`, in which it adds to other gradients.
    """
    if not profile.has_target(op.target):
        return 0
    count = 0
    for index, strategy in enumerate(strategies):
        key = local_key(op, strategy, sizes, values, profile.device)
        row = profile.find(key) if key is not None else None
        if row is None:
            continue
        count += 1
        price.forward_s[index] = row.forward_s
        price.backward_s[index] = row.backward_s + adding_s[index] if price.backward_s[index] > 0 else 0.0
        if row.energy_j is not None:
            price.microbatch_j[index] = row.energy_j
    return count
