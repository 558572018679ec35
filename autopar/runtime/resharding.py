"""Values on their way between stages with meshes of their own, and gradients on their way back.

A `Route` knows the boxes of one value that go from the ranks of one stage to those of another
(`rules.resharding.pieces`). What arrives lies in the receiver's buffer at once where its box is one piece of memory
there, and is put, or added, where it belongs once all has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import RewriteError
from autopar.ir.placement import Sharding, format_sharding
from autopar.program.stage import BoundaryTensor
from autopar.rules.resharding import Box, Held, Piece, pieces
from autopar.runtime.mesh import RankMesh


@dataclass(frozen=True)
class Route:
    """One value from stage to stage.

    Attributes:
        shape: of the whole value.
        source, target: how the stages hold it.
        first_sender, first_receiver: first ranks of the stages in the world.
        rank: this rank's place in its stage, which is one of the two.
        group: of all ranks of both.
    """

    shape: tuple[int, ...]
    source: Held
    target: Held
    first_sender: int
    first_receiver: int
    rank: int
    group: dist.ProcessGroup

    def __post_init__(self) -> None:
        if pieces(self.shape, self.source, self.target) is None:
            ways = f"{format_sharding(self.source.sharding)} on {self.source.mesh.sizes} and {self.target.mesh.sizes}"
            raise RewriteError(f"a value of shape {self.shape} crosses a cut as {ways}, where it does not divide")

    @property
    def _pieces(self) -> tuple[Piece, ...]:
        return pieces(self.shape, self.source, self.target) or ()

    def outgoing(self, x: Tensor) -> list[dist.P2POp]:
        """Sends of this rank, whose part is `x`."""
        mine = _box_of(self.source, self.shape, self.rank)
        return [
            dist.P2POp(
                dist.isend, _at(x.detach(), mine, p.box).contiguous(), self.first_receiver + p.receiver, self.group
            )
            for p in self._pieces
            if p.sender == self.rank
        ]

    def incoming(self, buffer: Tensor) -> Arrival:
        """Receives of this rank into its part."""
        buffer, mine = buffer.detach(), _box_of(self.target, self.shape, self.rank)
        own = [p for p in self._pieces if p.receiver == self.rank]
        is_sum = self.source.sums or not own
        arrival = Arrival(starts_at=buffer if is_sum else None)
        for piece in own:
            place = _at(buffer, mine, piece.box)
            is_there = place.is_contiguous() and not is_sum
            part = place if is_there else torch.empty_like(place, memory_format=torch.contiguous_format)
            arrival.operations.append(dist.P2POp(dist.irecv, part, self.first_sender + piece.sender, self.group))
            if not is_there:
                arrival.parts.append((place, part))
        return arrival


@dataclass
class Arrival:
    """What a rank waits for.

    Attributes:
        starts_at: a buffer in which parts are added up; None: each part has its place.
        parts: (where it belongs, what is received).
    """

    starts_at: Tensor | None
    operations: list[dist.P2POp] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def finish(self) -> None:
        """After all receives."""
        if self.starts_at is not None:
            self.starts_at.zero_()
        for place, part in self.parts:
            if self.starts_at is None:
                place.copy_(part)
            else:
                place.add_(part)


def _box_of(held: Held, shape: tuple[int, ...], rank: int) -> Box:
    box = held.box(shape, rank)
    assert box is not None, (held, shape)
    return box


def _at(local: Tensor, own: Box, box: Box) -> Tensor:
    """The part of a rank's tensor that is `box` of the whole value; the tensor is `own` of it."""
    for dim, ((start, _), (first, stop)) in enumerate(zip(own, box, strict=True)):
        if (first, stop) != own[dim]:
            local = local.narrow(dim, first - start, stop - first)
    return local


def _between(
    mesh: RankMesh, shape: tuple[int, ...], sharding: Sharding, stages: tuple[int, int], *, is_dual: bool = False
) -> Route:
    """From the first to the second of two stages, this rank's being one of them; of the gradient with `is_dual`."""
    source, target = (Held(mesh.meshes[stage], sharding) for stage in stages)
    if is_dual:
        source, target = source.dual, target.dual
    firsts = tuple(mesh.first_rank(stage) for stage in stages)
    group = next(group for key, group in mesh.tied.items() if set(stages) <= set(key))
    return Route(shape, source, target, firsts[0], firsts[1], mesh.rank_in_stage, group)


@dataclass(frozen=True)
class Cut:
    """The values that cross a cut, in order, and how their gradients go back: None where there is none."""

    values: tuple[Route, ...]
    gradients: tuple[Route | None, ...]


def make_cut(mesh: RankMesh, before: int, tensors: Sequence[BoundaryTensor]) -> Cut:
    """The cut between stages `before` and `before + 1`, one of which is this rank's."""
    ways, back = (before, before + 1), (before + 1, before)
    return Cut(
        tuple(_between(mesh, t.whole, t.sharding, ways) for t in tensors),
        tuple(_between(mesh, t.whole, t.sharding, back, is_dual=True) if t.requires_grad else None for t in tensors),
    )


def sum_over_stages(
    mesh: RankMesh, shape: tuple[int, ...], sharding: Sharding, stages: Iterable[int], part: Tensor
) -> Tensor:
    """The sum of what stages hold in one sharding, each on its mesh; this rank's part of it, in the same order."""
    terms: dict[int, Tensor] = {mesh.stage: part}
    arrivals: list[Arrival] = []
    operations: list[dist.P2POp] = []
    for other in sorted(set(stages) - {mesh.stage}):
        terms[other] = torch.empty_like(part)
        operations += _between(mesh, shape, sharding, (mesh.stage, other)).outgoing(part)
        arrivals.append(_between(mesh, shape, sharding, (other, mesh.stage)).incoming(terms[other]))
        operations += arrivals[-1].operations
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for arrival in arrivals:
        arrival.finish()
    first, *others = (terms[stage] for stage in sorted(terms))
    return sum(others, start=first)
