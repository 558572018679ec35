"""Pretended ranks in one process: what each rank of a mesh holds of a tensor, and what all of them hold together."""

from __future__ import annotations

import torch

from autopar.ir.placement import Placement, Sharding


def place(whole: torch.Tensor, sharding: Sharding, sizes: tuple[int, ...], sums: str) -> list[torch.Tensor]:
    """What each rank holds, row-major. Placements of kind `sums` hold terms: "P" for values, "R" for gradients."""
    held = [whole]
    for placement, size in zip(sharding, sizes, strict=True):
        held = [part for tensor in held for part in _spread(tensor, placement, size, sums)]
    return held


def _spread(tensor: torch.Tensor, placement: Placement, size: int, sums: str) -> list[torch.Tensor]:
    if placement.is_shard:
        return list(tensor.chunk(size, placement.dim))
    if placement.kind != sums or not tensor.is_floating_point():
        return [tensor] * size
    terms = [torch.rand_like(tensor) for _ in range(size - 1)]
    return [*terms, tensor - sum(terms)]


def gather(held: list[torch.Tensor], sharding: Sharding, sizes: tuple[int, ...], sums: str) -> torch.Tensor:
    """The whole tensor that the ranks hold together; ranks that must agree are compared."""
    for placement, size in reversed(list(zip(sharding, sizes, strict=True))):
        held = [_join(held[i : i + size], placement, sums) for i in range(0, len(held), size)]
    return held[0]


def _join(parts: list[torch.Tensor], placement: Placement, sums: str) -> torch.Tensor:
    if placement.is_shard:
        return torch.cat(parts, placement.dim)
    if placement.kind == sums and parts[0].is_floating_point():
        return sum(parts[1:], parts[0])
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=1e-11, atol=1e-11)
    return parts[0]
