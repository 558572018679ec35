"""Devices with round numbers, so that prices can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.cost.device import DeviceSpec, Link
from autopar.cost.hardware import Cluster, load_cluster


def plain_spec(**changes: Any) -> DeviceSpec:
    """1 TFLOP/s, 100 GB/s memory, 10 GB/s link, 10 GB/s node port, no fixed times, 100 W above blocked."""
    base = load_cluster("h100-sxm-80gb", 1).spec
    return replace(
        base,
        **{
            "peak_flops": {"float32": 1e12, "float64": 1e12},
            "memory_bytes_per_s": 1e11,
            "memory_efficiency": 1.0,
            "gemm_efficiency": 1.0,
            "convolution_efficiency": 1.0,
            "attention_efficiency": 1.0,
            "gemm_ramp_s": 0.0,
            "multiprocessors": 0.0,
            "gemm_backward_efficiency": 0.0,
            "attention_backward_efficiency": 0.0,
            "dispatch_s": 0.0,
            "launch_overhead_s": 0.0,
            "intra_node": Link(1e10, 0.0, 0.0, 0.0, 0.0),
            "inter_node": Link(1e10, 0.0, 0.0, 0.0, 0.0),
            "blocked_w": 50.0,
            "limit_w": 150.0,
            "host_w_per_node": 200.0,
            "gemm_share": 0.5,
            "memory_share": 0.25,
            **changes,
        },
    )


def plain_cluster(num_gpus: int = 8, gpus_per_node: int = 8, memory_bytes: int = 10**12, **changes: Any) -> Cluster:
    return Cluster(plain_spec(**changes), num_gpus, gpus_per_node, memory_bytes)
