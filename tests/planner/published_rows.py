"""Rows in the schema of published tables, small enough to price in a second."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from autopar.planner.published import NEEDED, OPTIONAL

COLUMNS = (*OPTIONAL, *NEEDED)
SMALL = {
    "row_id": "T-0", "source_title": "Megatron-LM small table | one", "source_ref": "none", "model": "GPT tiny",
    "hardware": "A100-80GB SXM", "n_gpus": "4", "gpus_per_node": "8", "layers": "4", "hidden": "512", "heads": "8",
    "vocab": "1000", "seq": "128", "dp": "2", "tp": "2", "pp": "1", "mbs": "4", "gbs": "16", "recompute": "none",
    "zero": "0", "sp": "no", "dtype": "fp16", "iter_time_s": "0.05", "status": "ok", "config_quality": "A",
}  # fmt: skip
"""A sound row; everything else is empty."""


def row(**changes: str) -> dict[str, str]:
    """`SMALL` with other cells."""
    return {column: (SMALL | changes).get(column, "") for column in COLUMNS}


def write_table(path: Path, rows: Sequence[dict[str, str]], without: Sequence[str] = ()) -> str:
    """Write rows as CSV, columns `without` left out; returns the path."""
    kept = [column for column in COLUMNS if column not in without]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
