"""Every redistribution, step by step on pretended ranks: values forward, gradients backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from autopar.ir.placement import Placement, Sharding, format_sharding, local_shape
from autopar.rules.redistribute import RedistributeStep, redistribute_steps
from tests.pretend import gather, place

SHAPE = (4, 8)
PLACEMENTS = [Placement("S", 0), Placement("S", 1), Placement("I"), Placement("R"), Placement("P")]
PAIRS = list(itertools.product(itertools.product(PLACEMENTS, repeat=2), repeat=2))


def along(held: list[torch.Tensor], axis: int, sizes: tuple[int, ...], kind: str, dims: tuple[int, int]) -> None:
    """One collective, in place, on every group of ranks along `axis`; dims are (source dim, target dim)."""
    inner = sizes[1] if axis == 0 else 1
    starts = [r for r in range(len(held)) if (r // inner) % sizes[axis] == 0]
    for start in starts:
        ranks = [start + i * inner for i in range(sizes[axis])]
        for rank, tensor in zip(ranks, collective([held[r] for r in ranks], kind, dims), strict=True):
            held[rank] = tensor


def collective(parts: list[torch.Tensor], kind: str, dims: tuple[int, int]) -> list[torch.Tensor]:
    n, (source, target) = len(parts), dims
    if kind == "none":
        return parts
    if kind == "all_reduce":
        return [sum(parts[1:], parts[0])] * n
    if kind == "all_gather":
        return [torch.cat(parts, source)] * n
    if kind == "slice":
        return [part.chunk(n, target)[i] for i, part in enumerate(parts)]
    if kind == "reduce_scatter":
        return list(sum(parts[1:], parts[0]).chunk(n, target))
    if kind == "mask":
        return [part if i == 0 else torch.zeros_like(part) for i, part in enumerate(parts)]
    if kind == "all_to_all":
        return list(torch.cat(parts, source).chunk(n, target))
    assert kind == "pad"
    pieces = [torch.zeros_like(parts[0])] * n
    return [torch.cat([*pieces[:i], part, *pieces[i + 1 :]], source) for i, part in enumerate(parts)]


def run(steps: tuple[RedistributeStep, ...], held: list[torch.Tensor], sizes: tuple[int, ...], forward: bool) -> None:
    for step in steps if forward else reversed(steps):
        dims = (step.source.dim, step.target.dim)
        along(held, step.axis, sizes, step.forward if forward else step.backward, dims if forward else dims[::-1])


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=format_sharding)
def test_values_and_gradients_arrive(source: Sharding, target: Sharding) -> None:
    sizes = (2, 2)
    steps = redistribute_steps(source, target, sizes, requires_grad=True)
    if steps is None:
        assert any(s.is_shard and t.kind == "P" for s, t in zip(source, target, strict=True)) or overlaps(
            source, target
        )
        return
    value, gradient = torch.rand(SHAPE, dtype=torch.float64), torch.rand(SHAPE, dtype=torch.float64)
    held = place(value, source, sizes, "P")
    run(steps, held, sizes, forward=True)
    torch.testing.assert_close(gather(held, target, sizes, "P"), value, rtol=1e-12, atol=1e-12)
    held = place(gradient, target, sizes, "R")
    run(steps, held, sizes, forward=False)
    torch.testing.assert_close(gather(held, source, sizes, "R"), gradient, rtol=1e-12, atol=1e-12)


def overlaps(source: Sharding, target: Sharding) -> bool:
    """An inner split of one dim that has to be lifted while its axis must stay partial."""
    return source[1].is_shard and "P" in (target[0].kind, target[1].kind)


def test_steps_chain_from_source_to_target() -> None:
    for source, target in PAIRS:
        state = list(source)
        for step in redistribute_steps(source, target, (2, 2), requires_grad=True) or ():
            assert state[step.axis] == step.source
            state[step.axis] = step.target
            assert local_shape(SHAPE, tuple(state), (2, 2)) is not None


def test_nothing_moves_on_axes_of_size_one() -> None:
    for source, target in PAIRS:
        assert redistribute_steps(source, target, (1, 1), requires_grad=True) == ()


def test_values_without_gradient_treat_whole_placements_alike() -> None:
    whole = (Placement("R"), Placement("I"))
    assert redistribute_steps(whole, whole[::-1], (2, 2), requires_grad=False) == ()
