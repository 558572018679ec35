"""Measuring real steps of an executor: time on the wall, energy where a meter exists."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.quantity import Quantity
from autopar.runtime.executor import Executor


@dataclass(frozen=True)
class Measured:
    """A few steps.

    Attributes:
        losses: of every step.
        step_time: median, lowest and highest of the steps after the first (of all, if there is only one).
        energy: of the average step over all devices; None where nothing measures it.
        notes: what the reader must know to trust the numbers.
    """

    losses: tuple[float, ...]
    step_time: Quantity
    energy: Quantity | None
    notes: tuple[str, ...]


def measure_steps(executor: Executor, batch: Sequence[Tensor], num_steps: int) -> Measured:
    """Train `num_steps` steps on one batch; every rank must call. Rank 0 prints a line per step."""
    losses: list[float] = []
    seconds: list[float] = []
    for index in range(num_steps):
        started = time.perf_counter()
        losses.append(executor.step(batch))
        _finish(executor.options.device)
        seconds.append(time.perf_counter() - started)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"step {index + 1}/{num_steps}: loss {losses[-1]:.6g}, {seconds[-1]:.4g} s", flush=True)
    steady = seconds[1:] or seconds
    step_time = Quantity(statistics.median(steady), "s", "measured", min(steady), max(steady))
    return Measured(tuple(losses), step_time, None, ("no energy meter was read",))


def _finish(device: str) -> None:
    """Wait until the step is over on the device and on all ranks."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()
