"""Every redistribution step on real processes, value and gradient, against the definition of its placements."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, Placement, shard
from autopar.program.collectives import STEP_FUNCTIONS, AxisGroup
from tests.pretend import gather, place

PLACEMENTS = (INVARIANT, REPLICATE, PARTIAL, shard(0), shard(1), shard(2))
SHAPE = (6, 12, 6)


def run(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors by step and dtype, on every rank."""
    size = dist.get_world_size()
    axis = AxisGroup("x", size, dist.get_rank(), dist.group.WORLD)
    results = []
    for source in PLACEMENTS:
        for target in PLACEMENTS:
            if source == target or source.kind + target.kind not in STEP_FUNCTIONS:
                continue
            for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
                if PARTIAL in (source, target) and not dtype.is_floating_point:
                    continue
                error = _error(source, target, axis, dtype)
                results.append({"case": f"{source}->{target} {dtype}", "error": error})
    return results


def _error(source: Placement, target: Placement, axis: AxisGroup, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    whole, gradient = (torch.randint(0, 2, SHAPE, generator=generator).to(dtype) for _ in range(2))
    local = place(whole, (source,), (axis.size,), "P")[axis.index]
    local = local.transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous, as a view would be
    differentiable = dtype.is_floating_point
    local = local.detach().requires_grad_(differentiable)
    dims = tuple(p.dim for p in (source, target) if p.is_shard)
    moved = STEP_FUNCTIONS[source.kind + target.kind](local, axis, *dims)
    assert moved.dtype == dtype
    assert moved.is_contiguous() or source.kind + target.kind in ("IR", "RI", "IP", "RP")
    error = _distance(_all(moved.detach()), target, whole, "P")
    if not differentiable:
        return error
    torch.manual_seed(3)
    cotangent = place(gradient, (target,), (axis.size,), "R")[axis.index]
    moved.backward(cotangent)
    assert local.grad is not None
    return max(error, _distance(_all(local.grad), source, gradient, "R"))


def _all(tensor: torch.Tensor) -> list[torch.Tensor]:
    exact = tensor.double().contiguous()
    held = [torch.empty_like(exact) for _ in range(dist.get_world_size())]
    dist.all_gather(held, exact)
    return [part.to(tensor.dtype) for part in held]


def _distance(held: list[torch.Tensor], placement: Placement, whole: torch.Tensor, sums: str) -> float:
    found = gather(held, (placement,), (len(held),), sums)
    return float((found.double() - whole.double()).abs().max())


def fail_on_one_rank(arguments: dict[str, Any]) -> None:
    """Rank 1 raises while the others wait for it."""
    if dist.get_rank() == 1:
        raise ValueError("a broken shard")
    dist.barrier()


def die_on_one_rank(arguments: dict[str, Any]) -> None:
    """Rank 1 is killed while the others wait for it."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def report_processes(arguments: dict[str, Any]) -> None:
    """Write the process id and wait to be ended."""
    from pathlib import Path

    (Path(arguments["directory"]) / str(os.getpid())).touch()
    time.sleep(600)
