"""Same inputs, same bytes: whatever the threads, the order of hashes, and the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from dataclasses import replace
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.frontier import frontier
from autopar.search.solve import search
from tests.strategies import FakeDevice, FakeSource

source = FakeSource(5, (0, 1, 1, 2), 4, FakeDevice(12_000, 4), with_parameter=True, with_shared=True, num_clocks=3)
found = [search(source, Objective(kind), pins=Pins()) for kind in ("time", "energy", "edp")]
slowest_s = found[1].time_s
found.append(search(source, Objective("energy"), pins=Pins(), limits=Limits(deadline_s=0.9 * slowest_s), untied=True))
found += frontier(source, pins=Pins(), num_points=5).points
for solution in found:
    print(repr(replace(solution, wall_s=0.0)))
"""


def printed(threads: str, seed: str) -> bytes:
    changed = {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **changed}, cwd=ROOT, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout


@pytest.fixture(scope="module")
def first() -> bytes:
    return printed("1", "0")


@pytest.mark.parametrize(("threads", "seed"), [("4", "1"), ("2", "12345")])
def test_solutions_and_frontiers_are_the_same_bytes(first: bytes, threads: str, seed: str) -> None:
    assert len(first.splitlines()) >= 6
    assert printed(threads, seed) == first
