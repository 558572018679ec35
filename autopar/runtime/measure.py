"""Measuring real steps of an executor: time on the wall, energy where a meter exists."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.quantity import Quantity
from autopar.meters import NodeMeter, NodeReading, add_up, visible_gpus
from autopar.runtime.executor import Executor


@dataclass(frozen=True)
class Measured:
    """A few steps.

    Attributes:
        losses: of every step.
        step_time: median, lowest and highest of the steps after the first (of all, if there is only one).
        reading: energy over the `num_steady` steps of `step_time`, of all nodes.
        num_nodes: that were measured.
        total_s: of all steps.
    """

    losses: tuple[float, ...]
    step_time: Quantity
    reading: NodeReading | None
    num_steady: int
    num_nodes: int
    total_s: float

    def window_fields(self, device: str) -> dict[str, Any]:
        """Fields of `planner.run_energy.Window`, as JSON."""
        reading = None if self.reading is None else self.reading.as_json()
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
        return {"reading": reading, "num_steps": self.num_steady, "num_nodes": self.num_nodes, "device": name}


AfterStep = Callable[[int, float, float], None]
"""Called with the steps done so far, the loss of the last and its seconds."""


def measure_steps(
    executor: Executor,
    batches: Iterator[Sequence[Tensor]],
    num_steps: int,
    *,
    first_step: int = 0,
    after_step: AfterStep | None = None,
) -> Measured:
    """Train `num_steps` >= 1 steps; every rank must call. Rank 0 prints a line per step.

    Args:
        executor: of this rank.
        batches: of each step; how long the next one takes counts as part of the step.
        num_steps: to do now.
        first_step: done before, by an earlier run.
        after_step: see `AfterStep`; its time is not counted.
    """
    losses: list[float] = []
    last_step = first_step + num_steps

    def step(index: int) -> float:
        started = time.perf_counter()
        losses.append(executor.step(next(batches)))
        finish(executor.options.device)
        seconds = time.perf_counter() - started
        done = first_step + index + 1
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"step {done}/{last_step}: loss {losses[-1]:.6g}, {seconds:.4g} s", flush=True)
        if after_step is not None:
            after_step(done, losses[-1], seconds)
        return seconds

    return replace(measure_rounds(step, num_steps, executor.options.device), losses=tuple(losses))


def measure_rounds(run: Callable[[int], float], num_rounds: int, device: str) -> Measured:
    """Measure `num_rounds` >= 1 rounds, of which `run` does one and tells its seconds; every rank must call."""
    seconds = [run(0)] if num_rounds > 1 else []
    first = len(seconds)
    with node_meter(device) as meter:
        if meter is not None:
            meter.start()
        seconds += [run(index) for index in range(first, num_rounds)]
        reading = meter.stop() if meter is not None else None
    steady = seconds[first:]
    readings = readings_of(reading)
    step_time = Quantity(statistics.median(steady), "s", "measured", min(steady), max(steady))
    return Measured((), step_time, add_up(readings), len(steady), len(readings), sum(seconds))


def finish(device: str) -> None:
    """Wait until the step is over on the device and on all ranks."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def node_meter(device: str) -> Iterator[NodeMeter | None]:
    """The meter of this node, on its first rank; None on the others."""
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        yield None
        return
    with NodeMeter(_gpus() if device.startswith("cuda") else None) as meter:
        yield meter


def _gpus() -> list[int | str]:
    """The GPUs that the local ranks use, by identifier where torch tells."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        return visible_gpus(os.environ, count)
    named = [getattr(torch.cuda.get_device_properties(index), "uuid", None) for index in range(count)]
    if all(uuid is not None for uuid in named):
        return [f"GPU-{uuid}" for uuid in named]
    return visible_gpus(os.environ, count)


def readings_of(own: NodeReading | None) -> list[NodeReading]:
    """Readings of all nodes, on every rank."""
    if not dist.is_initialized():
        return [own] if own is not None else []
    found: list[NodeReading | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [reading for reading in found if reading is not None]


def energy_of_step(readings: Sequence[NodeReading], num_steps: int) -> tuple[Quantity | None, str]:
    """Joules per step of the processors of all nodes and a note; without a value if any node has none."""
    found = add_up(readings)
    if found is None or found.host.value_j is None:
        return None, f"energy unknown: {'no meter' if found is None else found.host.reason}"
    host, value = found.host, found.host.value_j
    low, high = (value if bound is None else bound for bound in (host.low_j, host.high_j))
    note = f"energy covers: {host.scope}" + (f" ({host.reason})" if host.reason else "")
    return Quantity(value / num_steps, "J", "measured", low / num_steps, high / num_steps), note
