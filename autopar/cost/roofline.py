"""Time of kernels: an efficiency-aware roofline, on arrays of local sizes.

    t = max(FLOPs / (peak * efficiency) + ramp, bytes / (bandwidth * efficiency)) + kernels * launch overhead

`ramp` makes small GEMMs slow GEMMs: one of F FLOPs reaches efficiency * F / (F + F_half) of the peak, with
F_half = ramp * peak * efficiency. At a share x of the highest clock the compute part takes 1 / x as long; memory and
launches do not change. FLOPs and bytes of forward and backward are priced apart. Source: Williams,
Waterman, Patterson 2009, with the saturation curve of the device file.
"""

from __future__ import annotations

import numpy as np

from autopar.cost.device import DeviceSpec
from autopar.ir.cost import Array


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
    if kind == "convolution" and dtype == "float32" and "tf32" in spec.peak_flops:
        return spec.peak("tf32") * efficiency
    return spec.peak(dtype) * efficiency


def memory_rate(spec: DeviceSpec) -> float:
    """Bytes/s that large streaming kernels reach."""
    return spec.memory_bytes_per_s * spec.memory_efficiency


def kernel_time_s(
    spec: DeviceSpec, kind: str, dtype: str, *, flops: Array, num_bytes: Array, num_kernels: Array | float
) -> Array:
    """Seconds of `num_kernels` > 0 kernels that share the FLOPs and bytes."""
    ramp = spec.gemm_ramp_s * num_kernels if kind != "other" else 0.0
    compute = np.where(flops > 0, flops / flop_rate(spec, kind, dtype) + ramp, 0.0) / spec.clock_share
    return np.maximum(compute, num_bytes / memory_rate(spec)) + num_kernels * spec.launch_overhead_s
