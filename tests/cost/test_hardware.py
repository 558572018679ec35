"""Loading clusters: names, overrides, bad input, the hash."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.hardware import list_gpus, load_cluster
from autopar.errors import InputError
from autopar.units import GIB


def test_unknown_gpu_names_close_ones() -> None:
    with pytest.raises(InputError, match="h100-sxm-80gb"):
        load_cluster("h100-sxm", 8)


@pytest.mark.parametrize("path", ["../pyproject", "schema", "H100-SXM-80GB", ""])
def test_names_that_are_no_device_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="unknown GPU"):
        load_cluster(path, 1)


@pytest.mark.parametrize(("gpus", "per_node", "memory"), [(0, None, None), (-1, 8, None), (8, 0, None), (8, 8, 0)])
def test_numbers_below_one_are_refused(gpus: int, per_node: int | None, memory: int | None) -> None:
    with pytest.raises(InputError, match="at least 1"):
        load_cluster("a100-sxm-80gb", gpus, per_node, memory)


def test_memory_is_capacity_less_reserve_unless_given() -> None:
    spec = load_cluster("a100-sxm-80gb", 8).spec
    assert load_cluster("a100-sxm-80gb", 8).memory_bytes == spec.capacity_bytes - spec.reserve_bytes
    assert load_cluster("a100-sxm-80gb", 8, memory_bytes=GIB).memory_bytes == GIB


def test_eight_k20_share_one_node() -> None:
    assert load_cluster("k20", 8).gpus_per_node == 8


def test_hash_depends_on_every_number() -> None:
    cluster = load_cluster("k20", 8)
    assert cluster.input_hash == load_cluster("k20", 8).input_hash
    others = [
        load_cluster("k20", 4),
        load_cluster("k20", 8, gpus_per_node=4),
        load_cluster("k20", 8, memory_bytes=GIB),
        replace(cluster, spec=replace(cluster.spec, launch_overhead_s=9e-6)),
    ]
    assert len({cluster.input_hash, *(other.input_hash for other in others)}) == 5


def test_every_listed_gpu_loads() -> None:
    names = [spec.name for spec in list_gpus()]
    assert names == sorted(names)
    assert all(load_cluster(name, 1).gpu == name for name in names)


def test_a_large_gemm_runs_near_but_not_above_the_limit() -> None:
    import numpy as np

    from autopar.cost.power import kernel_energy_j
    from autopar.cost.roofline import backward_share, gemm_s, kernel_time_s

    for spec in list_gpus():
        dtype = "bfloat16" if "bfloat16" in spec.peak_flops else "float32"
        flops, num_bytes = np.asarray([2 * 8192.0**3]), np.asarray([3 * 2 * 8192.0**2])
        computing_s = gemm_s(spec, dtype, np.asarray([[8192.0], [8192.0], [8192.0], [1.0]]))
        computing_s /= max(1.0, backward_share(spec, "gemm"))
        time_s = kernel_time_s(spec, "gemm", computing_s=computing_s, num_bytes=num_bytes, num_kernels=1)
        watts = spec.blocked_w + kernel_energy_j(spec, "gemm", dtype, flops, num_bytes)[0] / time_s[0]
        assert 0.85 * spec.limit_w <= watts <= 1.03 * spec.limit_w, spec.name
