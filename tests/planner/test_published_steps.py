"""Step times against published runs, beside the checkout: medians of a sample of every table keep the targets.

The 90th percentile takes all rows: `autopar validate`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from autopar.planner.validate import validate_tables

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "published"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the published tables are not beside the checkout")
EVERY = {"llm_foundry_mpt": 10, "vtrain_groundtruth": 5, "megatron_lm": 2, "torchtitan": 2, "mlperf_training": 3}
MEDIAN, WORST_SOURCE = 0.08, 0.12


def test_a_sample_of_published_steps_is_predicted(tmp_path: Path) -> None:
    paths = []
    for name, every in EVERY.items():
        rows = list(csv.DictReader((FOLDER / f"{name}.csv").open(encoding="utf-8")))
        path = tmp_path / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows[::every])
        paths.append(str(path))
    found = validate_tables(paths, jobs=1)
    errors: dict[str, list[float]] = {}
    for row in found.rows:
        assert not row.skipped, (row.row_id, row.skipped)
        assert row.time_s.predicted is not None
        assert row.time_s.measured is not None
        errors.setdefault(row.source, []).append(abs(row.time_s.predicted.value / row.time_s.measured - 1))
    everything = sorted(error for own in errors.values() for error in own)
    assert set(errors) == set(EVERY)
    assert everything[len(everything) // 2] <= MEDIAN
    for source, own in errors.items():
        assert sorted(own)[len(own) // 2] <= WORST_SOURCE, source
