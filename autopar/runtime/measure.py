"""Measuring real steps of an executor: time on the wall, energy where a meter exists."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.quantity import Quantity
from autopar.meters import EnergyMeter, NvmlMeter, RaplMeter, Reading
from autopar.runtime.executor import Executor


@dataclass(frozen=True)
class Measured:
    """A few steps.

    Attributes:
        losses: of every step.
        step_time: median, lowest and highest of the steps after the first (of all, if there is only one).
        energy: of the average of those steps, over all that the meters of all nodes cover; None where unknown.
        notes: what the reader must know to trust the numbers.
    """

    losses: tuple[float, ...]
    step_time: Quantity
    energy: Quantity | None
    notes: tuple[str, ...]


def measure_steps(executor: Executor, batch: Sequence[Tensor], num_steps: int) -> Measured:
    """Train `num_steps` >= 1 steps on one batch; every rank must call. Rank 0 prints a line per step."""
    losses: list[float] = []
    seconds: list[float] = []

    def step(index: int) -> None:
        started = time.perf_counter()
        losses.append(executor.step(batch))
        _finish(executor.options.device)
        seconds.append(time.perf_counter() - started)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"step {index + 1}/{num_steps}: loss {losses[-1]:.6g}, {seconds[-1]:.4g} s", flush=True)

    if num_steps > 1:
        step(0)
    first = len(losses)
    with node_meter(executor.options.device) as meter:
        if meter is not None:
            meter.start()
        for index in range(first, num_steps):
            step(index)
        reading = meter.stop() if meter is not None else None
    steady = seconds[first:]
    energy, note = energy_of_step(readings_of(reading), len(steady))
    step_time = Quantity(statistics.median(steady), "s", "measured", min(steady), max(steady))
    return Measured(tuple(losses), step_time, energy, (note,) if note else ())


def _finish(device: str) -> None:
    """Wait until the step is over on the device and on all ranks."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def node_meter(device: str) -> Iterator[EnergyMeter | None]:
    """The meter of this node, on its first rank; None on the others."""
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        yield None
    elif device.startswith("cuda"):
        with NvmlMeter(_gpu_indices()) as meter:
            yield meter
    else:
        yield RaplMeter()


def _gpu_indices() -> list[int]:
    """NVML indices of the GPUs that the local ranks use."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    listed = [int(part) for part in visible.split(",") if part.strip().isdecimal()]
    return listed[:count] if listed else list(range(count))


def readings_of(own: Reading | None) -> list[Reading]:
    """Readings of all nodes, on every rank."""
    if not dist.is_initialized():
        return [own] if own is not None else []
    found: list[Reading | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [reading for reading in found if reading is not None]


def energy_of_step(readings: Sequence[Reading], num_steps: int) -> tuple[Quantity | None, str]:
    """Joules per step over all nodes and a note; without a value if any node has none."""
    missing = [reading.reason for reading in readings if reading.value_j is None]
    if missing or not readings:
        return None, f"energy unknown: {missing[0] if missing else 'no meter'}"
    total = [0.0, 0.0, 0.0]
    for reading in readings:
        value = reading.value_j or 0.0
        low = value if reading.low_j is None else reading.low_j
        high = value if reading.high_j is None else reading.high_j
        total = [a + b for a, b in zip(total, (value, low, high), strict=True)]
    value, low, high = (joules / num_steps for joules in total)
    reasons = "; ".join(sorted({reading.reason for reading in readings if reading.reason}))
    scopes = ", ".join(sorted({reading.scope for reading in readings}))
    return Quantity(value, "J", "measured", low, high), f"energy covers: {scopes}" + (
        f" ({reasons})" if reasons else ""
    )
