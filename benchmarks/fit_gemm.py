"""Fit GEMM efficiency and ramp of `costmodels/` to measured GEMMs.

    python benchmarks/fit_gemm.py gemm.csv --gpu v100-sxm2-32gb [--hardware V100] [--json]

The CSV has columns hardware, dtype, M, N, K, batch, and time_ms or tflops. Fits time = ramp + FLOP / (peak x
efficiency), weighted by 1/time, and prints both with the median error; rows without sizes are skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

from autopar.cost.hardware import load_cluster

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "tf32": "tf32", "fp8": "float8_e4m3fn"}


def read(path: Path, hardware: str, peaks: dict[str, float]) -> list[tuple[float, float, float]]:
    """(FLOP, seconds, peak FLOP/s) of each usable row."""
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if hardware.lower() not in row["hardware"].lower() or not (row["M"] and row["N"] and row["K"]):
                continue
            flop = 2.0 * float(row["M"]) * float(row["N"]) * float(row["K"]) * float(row["batch"] or 1)
            peak = peaks.get(DTYPES.get(row["dtype"], "float16"))
            if peak is not None and row["time_ms"]:
                rows.append((flop, float(row["time_ms"]) * 1e-3, peak))
            elif peak is not None and row["tflops"]:
                rows.append((flop, flop / (float(row["tflops"]) * 1e12), peak))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--gpu", required=True, help="device file that gives the peaks")
    parser.add_argument("--hardware", default="", help="text in the hardware column; default: all rows")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = read(arguments.csv, arguments.hardware, dict(load_cluster(arguments.gpu, 1).spec.peak_flops))
    if not rows:
        print("no row with sizes and a time for this hardware", file=sys.stderr)
        return 2
    flop, seconds, peak = (np.asarray(column) for column in zip(*rows, strict=True))
    design = np.stack([np.ones_like(seconds), flop / peak], axis=1)
    solution, *_ = np.linalg.lstsq(design / seconds[:, None], np.ones_like(seconds), rcond=None)
    error = float(np.median(np.abs(design @ solution / seconds - 1)))
    result = {"rows": len(rows), "gemm_ramp_s": solution[0], "gemm_efficiency": 1 / solution[1], "median_error": error}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(
            f"{arguments.gpu}: {len(rows)} rows, ramp {solution[0] * 1e6:.1f} us, efficiency {1 / solution[1]:.2f}, "
            f"median error {error:.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
