"""What pieces of a value give on the other mesh, against the placements' own meaning, value and gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autopar.ir.mesh import stage_mesh
from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, Sharding, format_sharding, shard
from autopar.rules.resharding import Held, box_elements, most_moved, pieces

SHAPE = (4, 8)
PLACEMENTS = (INVARIANT, REPLICATE, PARTIAL, shard(0), shard(1))
MESHES = [stage_mesh(*sizes) for sizes in ((2, 1), (1, 2), (2, 2), (1, 1), (4, 1))]


def held_parts(held: Held, whole: np.ndarray) -> list[np.ndarray]:
    """What each rank holds: its slice; on an axis with P a term of the sum, the last being what the others lack."""
    generator, found = np.random.default_rng(0), []
    sizes = [s if p == PARTIAL else 1 for p, s in zip(held.sharding, held.mesh.sizes, strict=True)]
    terms = generator.integers(-9, 9, (*sizes, *SHAPE))
    flat = terms.reshape(-1, *SHAPE)
    flat[-1] = whole - flat[:-1].sum(axis=0)
    for rank in range(held.mesh.num_devices):
        at = [i if p == PARTIAL else 0 for p, i in zip(held.sharding, held.mesh.coordinate(rank), strict=True)]
        part = flat.reshape(*sizes, *SHAPE)[tuple(at)]
        for p, size, index in zip(held.sharding, held.mesh.sizes, held.mesh.coordinate(rank), strict=True):
            if p.is_shard:
                part = np.split(part, size, axis=p.dim)[index]
        found.append(part)
    return found


def whole_of(held: Held, parts: list[np.ndarray]) -> np.ndarray:
    """The value that ranks hold: the sum of what differs in P, each box once; copies must agree."""
    boxes: dict[object, list[np.ndarray]] = {}
    for rank, part in enumerate(parts):
        box = held.box(SHAPE, rank)
        boxes.setdefault((held.index_on(PARTIAL, rank), box), []).append(part)
    found = np.zeros(SHAPE, dtype=int)
    for (_, box), copies in boxes.items():
        assert all(np.array_equal(copy, copies[0]) for copy in copies)
        found[tuple(slice(*span) for span in box)] += copies[0]  # type: ignore[attr-defined]
    return found


def moved(source: Held, target: Held, parts: list[np.ndarray]) -> list[np.ndarray]:
    """What receivers put together."""
    sent = pieces(SHAPE, source, target)
    assert sent is not None
    found = []
    for rank in range(target.mesh.num_devices):
        box = target.box(SHAPE, rank)
        assert box is not None
        buffer, filled = np.zeros(SHAPE, dtype=int), np.zeros(SHAPE, dtype=int)
        for piece in (p for p in sent if p.receiver == rank):
            own = source.box(SHAPE, piece.sender)
            assert own is not None
            local = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(piece.box, own, strict=True))
            at = tuple(slice(*span) for span in piece.box)
            buffer[at] += parts[piece.sender][local]
            filled[at] += 1
        inside = tuple(slice(*span) for span in box)
        assert source.sums or filled.max() <= 1
        assert filled[inside].sum() == filled.sum()
        found.append(buffer[inside])
    return found


def shardings() -> list[Sharding]:
    return list(itertools.product(PLACEMENTS, repeat=2))


@pytest.mark.parametrize("sharding", shardings(), ids=format_sharding)
def test_values_and_gradients_arrive_whole_on_every_pair_of_meshes(sharding: Sharding) -> None:
    whole = np.arange(32).reshape(SHAPE) + 1
    for one, other in itertools.permutations(MESHES, 2):
        source, target = Held(one, sharding), Held(other, sharding)
        if pieces(SHAPE, source, target) is None:
            assert source.box(SHAPE, 0) is None or target.box(SHAPE, 0) is None
            continue
        for sends, takes in ((source, target), (target.dual, source.dual)):
            assert np.array_equal(whole_of(takes, moved(sends, takes, held_parts(sends, whole))), whole)


def test_a_rank_gets_what_it_needs_and_copies_take_turns() -> None:
    halves, whole = Held(stage_mesh(2, 1), (shard(0), INVARIANT)), Held(stage_mesh(1, 2), (shard(0), INVARIANT))
    there, back = pieces(SHAPE, halves, whole), pieces(SHAPE, whole.dual, halves.dual)
    assert there is not None
    assert back is not None
    assert sorted((p.sender, p.receiver, p.num_elements) for p in there) == [
        (0, 0, 16), (0, 1, 16), (1, 0, 16), (1, 1, 16),
    ]  # fmt: skip
    assert [(p.sender, p.receiver, p.num_elements) for p in back] == [(0, 0, 16), (1, 1, 16)]
    assert (most_moved(there, 2, 2), most_moved(back, 2, 2)) == (32, 16)
    assert box_elements(()) == 1


def test_what_does_not_divide_is_told() -> None:
    assert (
        pieces((3, 8), Held(stage_mesh(2, 1), (shard(0), INVARIANT)), Held(stage_mesh(1, 1), (shard(0),) * 2)) is None
    )
