"""Kernel times: tiles and waves by hand, monotonicity, launches, and published per-operator times."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.device import DeviceSpec
from autopar.cost.hardware import load_cluster
from autopar.cost.roofline import backward_share, gemm_s, kernel_time_s
from autopar.cost.table import CostTables
from autopar.ir.mesh import stage_mesh
from autopar.ir.software import Software
from tests.cost.devices import plain_cluster, plain_spec
from tests.toy_graphs import mlp_graph

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "gemm_and_ops.csv"
TILED = plain_spec(multiprocessors=10.0, gemm_depth=64.0)
"""1 TFLOP/s from ten multiprocessors."""


def seconds(spec: DeviceSpec, m: float, n: float, k: float, batch: float = 1.0) -> float:
    return float(gemm_s(spec, "float32", np.array([[m], [n], [k], [batch]]))[0])


def test_a_wave_of_tiles_takes_its_hand_computed_time() -> None:
    # ten tiles of 256 x 128 on ten multiprocessors of 0.1 TFLOP/s, 512 + 64 steps deep
    wave = 2 * 256 * 128 * (512 + 64) / 1e11
    assert seconds(TILED, 256, 1280, 512) == pytest.approx(wave)
    assert seconds(TILED, 2560, 128, 512) == pytest.approx(wave)
    # a column more is an eleventh tile: half a wave more, as twenty-one tiles of 128 x 128 in three waves of 0.93
    assert seconds(TILED, 256, 1281, 512) == pytest.approx(3 * wave / 2 / 0.93)
    # batches of small matrices are tiles too
    assert seconds(TILED, 256, 128, 512, 10) == pytest.approx(wave)


def test_deep_gemms_of_few_tiles_are_cut_along_their_depth() -> None:
    # one tile of 256 x 128, 4096 deep: as four pieces of 1024
    assert seconds(TILED, 256, 128, 4096) == pytest.approx(2 * 128 * 128 / 0.93 * (4096 / 4 + 64) / 1e11)
    assert seconds(TILED, 256, 128, 1023) == pytest.approx(2 * 64 * 64 / 0.4 * (1023 + 64) / 1e11)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 5000) for _ in range(3)), st.integers(1, 20)),
    axis=st.sampled_from([0, 1, 3]),
    factor=st.integers(2, 5),
)
def test_more_work_never_takes_less_and_never_beats_the_peak(
    shape: tuple[int, int, int, int], axis: int, factor: int
) -> None:
    for spec in (TILED, plain_spec()):
        time_s = seconds(spec, *shape)
        assert time_s >= 2 * np.prod(shape, dtype=float) / 1e12 * (1 - 1e-12)
        larger = list(shape)
        larger[axis] *= factor
        assert seconds(spec, *larger) >= time_s * (1 - 1e-12)


def test_depth_adds_to_every_wave_so_that_small_depths_run_slowly() -> None:
    rates = [2 * 2560.0**2 * k / seconds(TILED, 2560, 2560, k) for k in (64, 128, 1024, 8192)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(1e12 / 2)


def test_memory_and_arithmetic_of_tiled_gemms_overlap_in_part() -> None:
    one = {"computing_s": np.array([3.0]), "num_bytes": np.array([4e11]), "num_kernels": 0.0}
    assert kernel_time_s(TILED, "gemm", **one)[0] == pytest.approx(5.0)
    assert kernel_time_s(TILED, "attention", **one)[0] == 4.0
    assert kernel_time_s(plain_spec(), "gemm", **one)[0] == 4.0
    assert kernel_time_s(replace(TILED, clock_share=0.5), "attention", **one)[0] == 6.0


def test_launches_hide_behind_a_full_queue_and_fill_an_empty_one() -> None:
    graph = mlp_graph(8, (4, 8, 4))

    def totals(**changes: float) -> dict[int, float]:
        table = CostTables(graph, plain_cluster(**changes)).table(stage_mesh(1), 1)
        assert table is not None
        found: dict[int, float] = {}
        for node in table.nodes:
            if node.kind == "op":
                found[node.blocks[0]] = found.get(node.blocks[0], 0.0) + float(node.forward_s[0])
        return found

    free, short, long = totals(), totals(dispatch_s=1e-12), totals(dispatch_s=1.0)
    assert short == free
    assert long == pytest.approx({0: 2.0, 1: 2.0})


def test_gradients_are_added_to_those_of_earlier_microbatches() -> None:
    graph = mlp_graph(8, (4, 8), bias=False)

    def backward(software: Software, count: int) -> float:
        table = CostTables(graph, plain_cluster(), software=software).table(stage_mesh(1), count)
        assert table is not None
        return next(float(node.backward_s[0]) for node in table.nodes if node.name == "linear_0")

    # x [8 4] 128 B, w [8 4] 128 B, y [8 8] 256 B: wgrad reads x and y's gradient, writes w's
    assert backward(Software(), 1) == pytest.approx((128 + 256 + 128) / 1e11)
    # two microbatches of half of x and y: read the new gradient, read and write the sum, every other time
    assert backward(Software(), 2) == pytest.approx((64 + 128 + 128 + 3 * 128 / 2) / 1e11)
    # in the GEMM itself: the sum is read and written instead of the new gradient
    assert backward(Software(fusion="fused"), 2) == pytest.approx((64 + 128 + 128 + 128 / 2) / 1e11)
    assert backward(Software(prefetch_parameters=True), 2) == pytest.approx((64 + 128 + 128) / 1e11)


def test_eight_bits_speed_up_linear_layers_of_devices_that_have_them() -> None:
    graph = mlp_graph(8192, (8192, 8192), bias=False, dtype="bfloat16")
    times = []
    for fp8 in (False, True):
        table = CostTables(graph, load_cluster("h100-sxm-80gb", 1), software=Software(fp8=fp8)).table(stage_mesh(1), 1)
        assert table is not None
        times.append(next(float(node.forward_s[0]) for node in table.nodes if node.name == "linear_0"))
    assert 1.4 < times[0] / times[1] < 1.9


def test_large_gemms_reach_what_is_published_for_gpt_layers() -> None:
    for gpu, low, high in (
        ("v100-sxm2-32gb", 78e12, 90e12),
        ("a100-sxm-80gb", 235e12, 262e12),
        ("h100-sxm-80gb", 600e12, 750e12),
    ):
        spec = load_cluster(gpu, 1).spec
        for n, k in ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)):
            rate = 2.0 * 8192 * n * k / float(gemm_s(spec, "float16", np.array([[8192.0], [n], [k], [1.0]]))[0])
            assert low < rate < high, (gpu, n, k)
    assert backward_share(load_cluster("v100-sxm2-32gb", 1).spec, "gemm") > 1.2


@pytest.mark.skipif(not DATA.exists(), reason="published per-operator times are not part of the repository")
def test_prices_of_ops_stay_near_published_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    fits = importlib.import_module("fit_gemm")
    by_op = fits.errors(fits.read(DATA))
    found = {key: float(np.median(np.abs(e))) for key, e in by_op.items() if key[0].startswith("v100")}
    assert len(found) >= 24
    assert np.median(list(found.values())) < 0.10
    gemms = {op: error for (_, op), error in found.items() if "GEMM" in op or op.startswith("attention-")}
    assert max(gemms.values()) < 0.15
    assert max(found.values()) < 0.35
