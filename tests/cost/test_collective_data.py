"""Prices of collectives against published measurements, which stand beside the checkout where there are any."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "collectives.csv"
LARGEST_MEDIAN, LARGEST_GROUP_MEDIAN, LARGEST_P90 = 0.05, 0.15, 0.15


@pytest.fixture(name="fits")
def _fits() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import fit_collectives
    finally:
        sys.path.pop(0)
    return fit_collectives


@pytest.mark.skipif(not DATA.is_file(), reason="the measured collectives are not beside the checkout")
def test_measured_collectives_are_priced(fits: ModuleType) -> None:
    rows = fits.read(DATA)
    groups = list(fits.groups(rows))
    assert len(rows) > 15000
    assert len(groups) >= 44
    every = [np.abs(fits.errors(some)) for _, some in groups]
    too_far = [key for (key, _), error in zip(groups, every, strict=True) if np.median(error) > LARGEST_GROUP_MEDIAN]
    assert too_far == []
    assert np.median(np.concatenate(every)) <= LARGEST_MEDIAN
    assert np.quantile(np.concatenate(every), 0.9) <= LARGEST_P90


def test_a_fit_finds_the_parameters_that_made_the_rows(fits: ModuleType, tmp_path: Path) -> None:
    lines = ["hardware,collective,n_gpus,n_nodes,algo,notes,size_bytes,time_us,busbw_GBps"]
    for ranks in (2, 4, 8):
        for size in (2**20, 2**24, 2**28):
            time_s = 30e-6 + 5e-6 * (ranks - 1) + (2 * (ranks - 1) + 0.4) / ranks * size / 2e11
            lines.append(f"A100,all_reduce,{ranks},1,,,{size},{time_s * 1e6!r},")
    lines += ["A100,all_reduce,8,1,,,1024,9.0,", "B900,all_reduce,8,1,,,1048576,9.0,", "A100,gather,8,1,,,1048576,9,"]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    rows = fits.read(path)
    assert len(rows) == 9, "rows of small sizes, unknown hardware and other collectives are left out"
    assert fits.fit(rows) == pytest.approx(
        {"latency_s": 30e-6, "latency_per_hop_s": 5e-6, "bandwidth_bytes_per_s": 2e11, "ring_fill": 0.4}
    )


def test_bus_bandwidth_stands_in_for_a_time(fits: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "hardware,collective,n_gpus,n_nodes,algo,notes,size_bytes,time_us,busbw_GBps\n"
        "H200,all-gather,8,1,Ring,,8000000000,,350\n"
    )
    (row,) = fits.read(path)
    assert (row.kind, row.in_switch) == ("all_gather", False)
    assert row.time_s == pytest.approx(7 / 8 * 8 / 350)
