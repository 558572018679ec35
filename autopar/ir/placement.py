"""Placement: what one mesh axis does to one tensor, in value and in gradient.

Four placements, each with a fixed dual for the gradient (cotangent) of the value. The pairs make every
redistribution's backward a redistribution of the same family, so a program composed from them has the
serial gradients by construction.

| placement    | text | value on each rank of the axis     | gradient on each rank              |
|--------------|------|------------------------------------|------------------------------------|
| `Shard(dim)` | `Sd` | the rank's slice of tensor dim `d` | the same slice of the gradient     |
| `Invariant`  | `I`  | the whole value                    | the whole gradient, the same       |
| `Replicate`  | `R`  | the whole value                    | one term of a pending sum          |
| `Partial`    | `P`  | one term of a pending sum          | the whole gradient, the same       |

`Replicate` and `Invariant` hold the same values; they differ only in what backward leaves behind. For a value
that needs no gradient they are interchangeable. The naming follows meta-pytorch/spmd_types (R, I, V, P);
`Shard` is its V with a known dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """One of `S<dim>`, `I`, `R`, `P`; `dim` is -1 unless the kind is `S`."""

    kind: str
    dim: int = -1

    def __post_init__(self) -> None:
        if self.kind not in ("S", "I", "R", "P") or (self.kind == "S") != (self.dim >= 0):
            raise ValueError(f"not a placement: kind={self.kind!r} dim={self.dim}")

    def __str__(self) -> str:
        return f"S{self.dim}" if self.kind == "S" else self.kind

    @property
    def is_shard(self) -> bool:
        return self.kind == "S"

    @property
    def holds_whole_value(self) -> bool:
        return self.kind in ("I", "R")


INVARIANT = Placement("I")
REPLICATE = Placement("R")
PARTIAL = Placement("P")


def shard(dim: int) -> Placement:
    """Placement that slices tensor dim `dim` (>= 0) evenly over the axis."""
    return Placement("S", dim)


Sharding: TypeAlias = tuple[Placement, ...]
"""One placement per mesh axis, outermost axis first."""


def parse_placement(text: str) -> Placement:
    """Inverse of `str(placement)`. Raises ValueError for anything else."""
    if text.startswith("S") and text[1:].isdecimal():
        return shard(int(text[1:]))
    return Placement(text)


def format_sharding(sharding: Sharding) -> str:
    """`(S0, I)` becomes `S0,I`; the empty sharding is the empty string."""
    return ",".join(map(str, sharding))


def parse_sharding(text: str) -> Sharding:
    """Inverse of `format_sharding`."""
    return tuple(parse_placement(part) for part in text.split(",")) if text else ()


def local_shape(shape: Sequence[int], sharding: Sharding, axis_sizes: Sequence[int]) -> tuple[int, ...] | None:
    """Shape on one rank, or None where a sharded dim does not divide evenly.

    When several axes shard one dim, the outer axis splits first and the inner axis splits its slice.
    """
    local = list(shape)
    for placement, size in zip(sharding, axis_sizes, strict=True):
        if placement.is_shard:
            if placement.dim >= len(local) or local[placement.dim] % size:
                return None
            local[placement.dim] //= size
    return tuple(local)
