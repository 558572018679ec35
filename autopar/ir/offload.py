"""Offload: what of a training job lies outside of the memory of the devices, and where.

Optimizer states, and with them the copies that the optimizer updates where the plan has some, are brought to the device
for the update alone, a shard at a time (as ZeRO-Offload and ZeRO-Infinity keep them; there the processor updates).
Activations leave when forward has made them and come back ahead of their backward.
"""

from __future__ import annotations

from dataclasses import dataclass

PLACES = ("host", "disk")
"""Memory of the host, and files that are mapped into it."""
NOWHERE = "none"

SHARD_BYTES = 16 * 2**20
"""Optimizer states that are on a device at once, at most, unless those of one parameter are more."""
LEAST_BYTES = 2**16
"""Of what autograd saves in one piece of memory; smaller pieces stay where they are."""
WINDOW_BYTES = 256 * 2**20
"""Activations on their way from or to a device beside computation, at most."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where each lies: NOWHERE (on the device) or one of PLACES."""

    optimizer: str = NOWHERE
    activations: str = NOWHERE

    def __post_init__(self) -> None:
        for name in ("optimizer", "activations"):
            if getattr(self, name) not in (NOWHERE, *PLACES):
                known = ", ".join((NOWHERE, *PLACES))
                raise ValueError(f"offload of {name}: expected one of {known}, found {getattr(self, name)!r}")

    def __bool__(self) -> bool:
        return self != Offload()

    @property
    def words(self) -> str:
        """`optimizer states to host, activations to disk`; "" for nothing."""
        named = (("optimizer states", self.optimizer), ("activations", self.activations))
        return ", ".join(f"{what} to {place}" for what, place in named if place != NOWHERE)
