"""Resharding: which rank of one stage sends which box of a value to which rank of another stage, on another mesh.

The value is held in one sharding by the senders and wanted in one by the receivers; each receiver gets exactly the
boxes that it needs. Ranks that hold the same thing take turns, so that none sends to all. Where the senders hold terms
of a sum, the receiver gets and adds all of them; where the receivers want terms of a sum, the first of them gets the
value and the others have zeros. Gradients go back the conjugate way: between the duals, senders and receivers swapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.ir.mesh import StageMesh
from autopar.ir.placement import PARTIAL, REPLICATE, Placement, Sharding, local_shape

Box = tuple[tuple[int, int], ...]
"""[start, stop) of every dim of the whole value."""

_DUAL = {REPLICATE: PARTIAL, PARTIAL: REPLICATE}


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that goes from one rank to another, both counted from the first of their stage."""

    sender: int
    receiver: int
    box: Box

    @property
    def num_elements(self) -> int:
        return box_elements(self.box)


@dataclass(frozen=True)
class Held:
    """A value as the ranks of one stage hold it."""

    mesh: StageMesh
    sharding: Sharding

    @property
    def dual(self) -> Held:
        """Its gradient."""
        return Held(self.mesh, tuple(_DUAL.get(placement, placement) for placement in self.sharding))

    def box(self, shape: Sequence[int], rank: int) -> Box | None:
        """What a rank holds of a value of that shape; None where a dim does not divide evenly."""
        if local_shape(shape, self.sharding, self.mesh.sizes) is None:
            return None
        found = [(0, size) for size in shape]
        for placement, size, index in zip(self.sharding, self.mesh.sizes, self.mesh.coordinate(rank), strict=True):
            if placement.is_shard:
                start, stop = found[placement.dim]
                length = (stop - start) // size
                found[placement.dim] = (start + index * length, start + (index + 1) * length)
        return tuple(found)

    def index_on(self, placement: Placement, rank: int) -> tuple[int, ...]:
        """Position of a rank on the axes with that placement."""
        pairs = zip(self.sharding, self.mesh.coordinate(rank), strict=True)
        return tuple(index for p, index in pairs if p == placement)

    @property
    def sums(self) -> bool:
        """Ranks hold terms of a sum."""
        return any(p == PARTIAL and size > 1 for p, size in zip(self.sharding, self.mesh.sizes, strict=True))


@lru_cache(maxsize=4096)
def pieces(shape: tuple[int, ...], source: Held, target: Held) -> tuple[Piece, ...] | None:
    """All that is sent, in order of receiver, sender and box; None where a dim does not divide evenly."""
    holders: dict[tuple[tuple[int, ...], Box], list[int]] = {}
    for rank in range(source.mesh.num_devices):
        box = source.box(shape, rank)
        if box is None:
            return None
        holders.setdefault((source.index_on(PARTIAL, rank), box), []).append(rank)
    found = []
    for receiver in range(target.mesh.num_devices):
        wanted = target.box(shape, receiver)
        if wanted is None:
            return None
        if any(target.index_on(PARTIAL, receiver)):
            continue
        for (_, box), ranks in holders.items():
            common = _common(box, wanted)
            if common is not None:
                found.append(Piece(ranks[receiver % len(ranks)], receiver, common))
    return tuple(sorted(found, key=lambda piece: (piece.receiver, piece.sender, piece.box)))


def _common(box: Box, other: Box) -> Box | None:
    """What lies in both; None: nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    return found if all(start < stop for start, stop in found) else None


def box_elements(box: Box) -> int:
    """Elements of a box."""
    found = 1
    for start, stop in box:
        found *= stop - start
    return found


def most_moved(moved: Sequence[Piece], num_senders: int, num_receivers: int) -> int:
    """Elements that the busiest rank sends or receives."""
    sent, received = [0] * num_senders, [0] * num_receivers
    for piece in moved:
        sent[piece.sender] += piece.num_elements
        received[piece.receiver] += piece.num_elements
    return max(itertools.chain(sent, received))
