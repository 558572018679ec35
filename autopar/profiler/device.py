"""Measuring a device itself: rates of large kernels, the cost of a launch, transfers by size, the optimizer's update.

These replace the numbers of the device file, so that shapes never measured are modelled from this device's own
parameters. Every process of a run measures at the same time, so what they share (memory, caches) is shared here too.

    rate      FLOPs or bytes of the best of a few large kernels over its median time
    launch    median time of an op on a few elements
    ramp      what a small GEMM takes beyond FLOPs / rate and its launch
    transfer  a line through mean times at several sizes, weighted by 1 / time; each between two computations, as in
              training: what a process waits for the others, and its threads for a core, belongs to it
    update    of many parameters in one call, over their number
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar import torch_adapter
from autopar.ir.profile import MeasuredLine, MeasuredNumber
from autopar.profiler.measure import Settings, clock_of, timed_runs
from autopar.program.collectives import (
    AxisGroup,
    all_gather_dim,
    all_reduce_sum,
    all_to_all_dims,
    reduce_scatter_dim,
)

GEMM_SIZE, SMALL_GEMM_SIZE = 1024, 128
SOURCES = MappingProxyType(
    {
        "gemm": f"a product of {GEMM_SIZE} x {GEMM_SIZE} matrices",
        "convolution": "3 x 3, 64 to 64 channels, 28 x 28",
        "attention": "8 heads of 64, 256 tokens",
    }
)
STREAM_BYTES = 32 * 2**20
TRANSFER_BYTES = tuple(2**power for power in (10, 14, 16, 18, 20, 21, 22, 23, 24, 25))
UPDATE_BYTES = (2**12, 2**18, 2**20, 2**22)
UPDATED = 8
"""Parameters that an update is of."""
COLD_BUFFERS, ROUNDS = 9, 2
"""Transfers take turns, a few times, on so many buffers, since in training each moves data that has left the cache."""
BETWEEN = (256, 1024)
"""Rows and columns of what is multiplied between two transfers."""
COLUMNS = 8
"""Width of the matrices that transfers move, so that either dim can be cut."""


@dataclass(frozen=True)
class Kernel:
    """A call, and the FLOPs and bytes that one run of it takes."""

    run: Callable[[], Any]
    amount: float


def measure_rates(settings: Settings) -> tuple[MeasuredNumber, ...]:
    """Rates and overheads of the device."""

    def seconds(run: Callable[[], Any]) -> float:
        return statistics.median(timed_runs(run, settings))

    def rate(kernel: Kernel) -> float:
        return kernel.amount / seconds(kernel.run)

    launch_s = seconds(_launch(settings.device))
    kinds = {"gemm": _gemm, "convolution": _convolution, "attention": _attention}
    rates = {kind: rate(make(settings.device, "float32")) for kind, make in kinds.items()}
    peak = max(rates.values())
    small = _gemm(settings.device, "float32", SMALL_GEMM_SIZE)
    ramp_s = max(1e-9, seconds(small.run) - launch_s - small.amount / rates["gemm"])
    found = {
        "peak_flops.float32": (peak, "FLOP/s", "the best of products, convolutions and attention"),
        "kernels.gemm_ramp_s": (ramp_s, "s", f"a product of {SMALL_GEMM_SIZE} x {SMALL_GEMM_SIZE} matrices"),
        "kernels.launch_overhead_s": (launch_s, "s", "an addition of 8 elements"),
        "memory.bandwidth_bytes_per_s": (rate(_stream(settings.device)), "B/s", "a product of tensors of 32 MiB"),
        "memory.efficiency": (1.0, "1", "the bandwidth is that of a kernel"),
    }
    for kind, found_rate in rates.items():
        found[f"kernels.{kind}_efficiency"] = (found_rate / peak, "1", f"{SOURCES[kind]}, over the peak")
    for dtype in ("float64", "bfloat16"):
        value = rate(_gemm(settings.device, dtype)) * peak / rates["gemm"]
        found[f"peak_flops.{dtype}"] = (value, "FLOP/s", f"{SOURCES['gemm']}, over its efficiency in float32")
    return tuple(MeasuredNumber(path, *rest) for path, rest in sorted(found.items()))


def _random(shape: Sequence[int], device: str, dtype: str) -> Tensor:
    return torch.randn(*shape, device=device).to(torch_adapter.dtype_of(dtype))


def _gemm(device: str, dtype: str, size: int = GEMM_SIZE) -> Kernel:
    a, b = (_random((size, size), device, dtype) for _ in range(2))
    return Kernel(lambda: a @ b, 2.0 * size**3)


def _stream(device: str) -> Kernel:
    a, b, c = (torch.randn(STREAM_BYTES // 4, device=device) for _ in range(3))
    return Kernel(lambda: torch.mul(a, b, out=c), 3.0 * STREAM_BYTES)


def _launch(device: str) -> Callable[[], Any]:
    a, b = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    return lambda: a + b


def _convolution(device: str, dtype: str) -> Kernel:
    x, w = (
        torch.randn(*shape, device=device).to(torch_adapter.dtype_of(dtype))
        for shape in ((8, 64, 28, 28), (64, 64, 3, 3))
    )
    return Kernel(lambda: nn.functional.conv2d(x, w, padding=1), 2.0 * 9 * 64 * 64 * 28 * 28 * 8)


def _attention(device: str, dtype: str) -> Kernel:
    q, k, v = (_random((2, 8, 256, 64), device, dtype) for _ in range(3))
    return Kernel(lambda: nn.functional.scaled_dot_product_attention(q, k, v), 4.0 * 2 * 8 * 256 * 256 * 64)


def measure_transfers(settings: Settings, sizes: Sequence[int] = TRANSFER_BYTES) -> tuple[MeasuredLine, ...]:
    """Redistributions between all processes (2, 4 or 8), as programs run them, and a send; every process must call."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    axis = AxisGroup("all", ranks, rank, dist.group.WORLD)
    moves: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": lambda x: all_reduce_sum(x, axis),
        "all_gather": lambda x: all_gather_dim(x[: len(x) // ranks], axis, 0),
        "reduce_scatter": lambda x: reduce_scatter_dim(x, axis, 0),
        "all_to_all": lambda x: all_to_all_dims(x, axis, 0, 1),
        "send": _pass_on,
    }
    found = []
    for kind, move in moves.items():
        points = []
        for size in sizes:
            buffers = torch.randn(COLD_BUFFERS, size // 4 // COLUMNS, COLUMNS, device=settings.device)
            seconds = amid_computation_s([partial(move, x) for x in buffers], settings.device)
            points.append((float(size), seconds / (2 if kind == "send" else 1)))
        found.append(line(kind, ranks, points))
    return tuple(found)


def _pass_on(x: Tensor) -> None:
    """Two sends: rank 0 to rank 1, and back."""
    other = 1 - dist.get_rank()
    if other == 1:
        dist.send(x, 1)
        dist.recv(x, 1)
    elif other == 0:
        dist.recv(x, 0)
        dist.send(x, 0)


def amid_computation_s(runs: Sequence[Callable[[], Any]], device: str) -> float:
    """Mean seconds that a run adds to a computation before it, in processes that go on together."""
    x, w = (torch.randn(rows, BETWEEN[1], device=device) for rows in BETWEEN)
    clock, found = clock_of(device), []
    dist.barrier()
    for run in (runs[-1], *ROUNDS * list(runs)):
        began, computing = time.perf_counter(), clock()
        x @ w.T
        computed_s = clock() - computing
        run()
        found.append(time.perf_counter() - began - computed_s)
    return statistics.mean(found[1:])


def measure_update(settings: Settings, sizes: Sequence[int] = UPDATE_BYTES) -> tuple[MeasuredLine, ...]:
    """AdamW in one kernel, as programs run it: for one of several parameters, by its bytes."""
    points = []
    for size in sizes:
        parameters = [nn.Parameter(torch.randn(size // 4, device=settings.device)) for _ in range(UPDATED)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        update = torch.optim.AdamW(parameters, fused=True).step
        points.append((float(size), statistics.median(timed_runs(update, settings)) / UPDATED))
    return (line("update:adamw", 1, points),)


def line(kind: str, ranks: int, points: Sequence[tuple[float, float]]) -> MeasuredLine:
    """The line through (bytes, seconds) with the least sum of squared relative errors; neither part is negative."""
    sizes, seconds = np.asarray(points).T
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    latency_s, s_per_byte = (float(x) for x in np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)[0])
    if latency_s < 0:
        latency_s, s_per_byte = 0.0, float(np.median(seconds / sizes))
    if s_per_byte < 0:
        latency_s, s_per_byte = float(np.median(seconds)), 0.0
    error = float(np.median(np.abs((latency_s + sizes * s_per_byte) / seconds - 1)))
    return MeasuredLine(kind, ranks, latency_s, s_per_byte, error)
