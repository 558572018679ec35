"""Time of kernels, on arrays of local sizes: what computing takes, against what memory traffic takes.

    streaming kernels, fused attention     t = max(compute, memory)
    GEMMs cut into tiles                   t = sqrt(compute^2 + memory^2)
    all                                    t + kernels * launch overhead

`memory` is bytes / (bandwidth * efficiency). `compute` is FLOPs / (peak * efficiency) + ramp, and of a GEMM

    waves * tile rows * tile columns * 2 * (K + depth) / (peak * efficiency * tile share / multiprocessors) + ramp

for the best of `TILES`: every multiprocessor works on one tile at a time, in `waves` = tiles / multiprocessors rounded
up; rows and columns are rounded up to tiles; `depth` is what filling and emptying a tile's pipeline costs, in steps
of K. Where tiles do not fill the device, K is cut too (split-K), down to `SPLIT_DEPTH`. The root of squares is what
imperfect overlap of loads and arithmetic inside a tile comes to. On devices without `multiprocessors` GEMMs are
FLOPs / rate + ramp too.

At a lower clock computing takes 1 / `spec.speed` as long; memory and launches do not change. Sources: Williams,
Waterman, Patterson 2009 (roofline); the shares of tiles and the root are fitted by `benchmarks/fit_gemm.py` to
published per-operator times.
"""

from __future__ import annotations

import numpy as np

from autopar.cost.device import DeviceSpec
from autopar.ir.cost import Array

TILES = np.array([(256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.93), (128, 64, 0.6), (64, 128, 0.6), (64, 64, 0.4)])
"""Rows, columns, and share of the best tile's rate."""
SPLIT_DEPTH = 1024.0


def flop_rate(spec: DeviceSpec, kind: str, dtype: str) -> float:
    """FLOP/s that large kernels of a kind reach at the highest clock.

    float32 convolutions run on tf32 units where the device has them (torch's default); float32 GEMMs do not.
    """
    efficiency = {
        "gemm": spec.gemm_efficiency,
        "convolution": spec.convolution_efficiency,
        "attention": spec.attention_efficiency,
        "other": spec.gemm_efficiency,
    }[kind]
    if kind == "other":
        return spec.peak("float32") * efficiency
    if on_tf32(spec, kind, dtype):
        return spec.peak("tf32") * (spec.tf32_efficiency if kind == "gemm" and spec.tf32_efficiency else efficiency)
    return spec.peak(dtype) * efficiency


def on_tf32(spec: DeviceSpec, kind: str, dtype: str) -> bool:
    """Whether a kernel runs on tf32 units."""
    return "tf32" in spec.peak_flops and (dtype == "tf32" or (kind == "convolution" and dtype == "float32"))


def backward_share(spec: DeviceSpec, kind: str) -> float:
    """Rate of backward over that of forward."""
    own, forward = {
        "gemm": (spec.gemm_backward_efficiency, spec.gemm_efficiency),
        "attention": (spec.attention_backward_efficiency, spec.attention_efficiency),
    }.get(kind, (0.0, 1.0))
    return own / forward if own else 1.0


def memory_rate(spec: DeviceSpec) -> float:
    """Bytes/s that large streaming kernels reach."""
    return spec.memory_bytes_per_s * spec.memory_efficiency


def compute_s(spec: DeviceSpec, kind: str, dtype: str, flops: Array) -> Array:
    """Seconds of arithmetic at the highest clock, whatever the shape."""
    ramp = spec.gemm_ramp_s if kind != "other" else 0.0
    return np.where(flops > 0, flops / flop_rate(spec, kind, dtype) + ramp, 0.0)


def gemm_s(spec: DeviceSpec, dtype: str, shapes: Array) -> Array:
    """Seconds of arithmetic of GEMMs at the highest clock; `shapes` is [4, gemm]: rows, columns, depth, batch."""
    rows, columns, depth, batch = shapes
    if not spec.multiprocessors:
        return compute_s(spec, "gemm", dtype, 2.0 * rows * columns * depth * batch)
    tile_rows, tile_columns, share = TILES[:, :, None].swapaxes(0, 1)
    tiles = np.ceil(rows / tile_rows) * np.ceil(columns / tile_columns) * batch
    splits = np.maximum(1.0, np.minimum(np.floor(spec.multiprocessors / tiles), np.floor(depth / SPLIT_DEPTH)))
    waves = np.ceil(tiles * splits / spec.multiprocessors)
    per_step = 2.0 * tile_rows * tile_columns / share
    found = waves * (depth / splits + spec.gemm_depth) * per_step
    rate = flop_rate(spec, "gemm", dtype) / spec.multiprocessors
    best: Array = found.min(axis=0) / rate + spec.gemm_ramp_s
    return best


def kernel_time_s(
    spec: DeviceSpec, kind: str, *, computing_s: Array, num_bytes: Array, num_kernels: Array | float
) -> Array:
    """Seconds of kernels that compute for `computing_s` at the highest clock and move `num_bytes` between them."""
    compute, memory = computing_s / spec.speed, num_bytes / memory_rate(spec)
    joint = np.hypot(compute, memory) if kind == "gemm" and spec.multiprocessors else np.maximum(compute, memory)
    found: Array = joint + num_kernels * spec.launch_overhead_s
    return found
