"""Fit alpha-beta parameters of `costmodels/` to measured collectives.

    python benchmarks/fit_collectives.py collectives.csv [--json]

The CSV has columns hardware, collective, n_gpus, n_nodes, size_bytes and time_us (or busbw_GBps). For each hardware,
collective and group size on one node, weighted by 1/time:

    time = latency + factor(n) * bytes / bandwidth

with factor 2 (n-1)/n for all_reduce and (n-1)/n for the others. Prints one line per fit with the median error. The
device file takes the bandwidth of the whole node's group, and a line through the latencies over n - 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
Row = tuple[str, int, float, float]


def read(path: Path) -> dict[tuple[str, int], list[Row]]:
    """(hardware, group size) -> (collective, ranks, bytes, seconds); rows without a time are derived from bandwidth."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kind = row["collective"].replace("-", "_").split(",")[0]
            if kind not in PASSES or not row["n_gpus"] or not row["size_bytes"] or row["n_nodes"] != "1":
                continue
            ranks, size = int(row["n_gpus"]), float(row["size_bytes"])
            if row["time_us"]:
                seconds = float(row["time_us"]) * 1e-6
            elif row["busbw_GBps"] and float(row["busbw_GBps"]) > 0:
                seconds = factor(kind, ranks) * size / (float(row["busbw_GBps"]) * 1e9)
            else:
                continue
            groups[row["hardware"], ranks].append((kind, ranks, size, seconds))
    return groups


def factor(kind: str, ranks: int) -> float:
    """Bytes sent by one rank per byte of the collective."""
    return PASSES[kind] * (ranks - 1) / ranks


def fit(rows: list[Row]) -> dict[str, Any]:
    """Latency, seconds per byte and median relative error of rows of one group size, weighted by 1/time."""
    times = np.asarray([seconds for *_, seconds in rows])
    sent = np.asarray([factor(kind, ranks) * size for kind, ranks, size, _ in rows])
    design: NDArray[np.float64] = np.stack([np.ones_like(times), sent], axis=1)
    solution, *_ = np.linalg.lstsq(design / times[:, None], np.ones_like(times), rcond=None)
    error = float(np.median(np.abs(design @ solution / times - 1)))
    return {
        "rows": len(rows),
        "latency_s": solution[0],
        "bandwidth_bytes_per_s": 1 / solution[1],
        "median_error": error,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = []
    for (hardware, ranks), rows in sorted(read(arguments.csv).items()):
        for kind in sorted({row[0] for row in rows}):
            some = [row for row in rows if row[0] == kind]
            if len(some) >= 4:
                found.append({"hardware": hardware, "collective": kind, "ranks": ranks, **fit(some)})
    if arguments.json:
        print(json.dumps({"fits": found}, indent=1))
        return 0
    for f in found:
        print(
            f"{f['hardware'][:40]:40} {f['collective']:14} {f['ranks']:2} ranks {f['rows']:5} rows "
            f"{f['latency_s'] * 1e6:7.1f} us {f['bandwidth_bytes_per_s'] / 1e9:7.1f} GB/s {f['median_error']:6.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
