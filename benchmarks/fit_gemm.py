"""Hold the prices of kernels against measured ones, and fit the numbers of a device file to them.

    python benchmarks/fit_gemm.py ops.csv [--gpu v100-sxm2-32gb] [--fit] [--json]

The CSV has columns hardware, op, dtype, M, N, K, batch, time_ms or tflops, notes. Three kinds of rows are used:

- GEMMs with sizes and a rate, called `matmul...`, `mm` or `bmm`;
- layers of `EleutherAI/cookbook`, whose sizes are in their notes (`layer of a=16 h=4096 mbs=4 s=2048 v=51200 tp=1`);
- per-operator profiles of GPT layers of `microsoft/SuperScaler`, forward and backward, whose sizes follow from the
  model in their notes and `MODELS`. Rows whose time includes a collective are left out, and so are those shorter than
  `SHORTEST_S`, which the profiler's own launches fill.

Prints the median signed, median and 90th percentile errors by device and op. With `--fit`, forward and backward
efficiency of GEMMs, and `gemm_depth`, of `--gpu` are those with the least mean error (by search over a grid).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autopar.cost.device import DeviceSpec
from autopar.cost.hardware import load_cluster
from autopar.cost.roofline import backward_share, gemm_s, kernel_time_s

GPUS = {
    "V100": "v100-sxm2-32gb", "A100 SXM": "a100-sxm-80gb", "A100-class": "a100-sxm-40gb", "A100 PCIe": "a100-pcie-80gb",
    "NVIDIA H100 SXM": "h100-sxm-80gb", "NVIDIA B200 SXM": "b200-sxm-180gb", "MI300X": "mi300x",
}  # fmt: skip
MODELS = {
    "350M": (1024, 16), "1.3B": (2048, 32), "2.6B": (2560, 32), "6.7B": (4096, 32), "13B": (5120, 40),
    "scale-layer": (512, 8),
}  # fmt: skip
"""Hidden size and heads."""
SHORTEST_S = 150e-6
Shape = tuple[float, float, float, float]
"""Rows, columns, depth, batch."""


@dataclass(frozen=True)
class Sample:
    """One measured op: its GEMMs, or the bytes that streaming kernels move in so many launches."""

    gpu: str
    op: str
    is_backward: bool
    gemms: tuple[Shape, ...]
    num_bytes: float
    kernels: int
    time_s: float


def read(path: Path) -> list[Sample]:
    """Samples of all usable rows."""
    found: list[Sample] = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            gpu = next((gpu for text, gpu in GPUS.items() if text in row["hardware"]), None)
            if gpu is not None:
                found += _samples(row, gpu)
    return found


def _samples(row: Mapping[str, str], gpu: str) -> Iterator[Sample]:
    if "forward us=" in row["notes"]:
        yield from _profiled(row, gpu)
    elif "layer of a=" in row["notes"] and row["tflops"]:
        sizes = {key: int(value) for key, value in re.findall(r"(\w)=(\d+)", row["notes"])}
        shape = _layer(row["op"], sizes | {"b": int(re.findall(r"mbs=(\d+)", row["notes"])[0])})
        if shape is not None:
            yield _gemm(gpu, row["op"].split(" ")[0], shape, float(row["tflops"]))
    elif row["M"] and row["N"] and row["K"] and row["tflops"] and "theory" in row["notes"]:
        if "fp8" in row["notes"] or float(re.findall(r"theory ([\d.]+)", row["notes"])[0]) > 1.2 * _peak(gpu):
            return
        shape = (float(row["M"]), float(row["N"]), float(row["K"]), float(row["batch"] or 1))
        yield _gemm(gpu, "best of a sweep", shape, float(row["tflops"]))


def _peak(gpu: str) -> float:
    return load_cluster(gpu, 1).spec.peak("float16") / 1e12


def _gemm(gpu: str, op: str, shape: Shape, tflops: float) -> Sample:
    return Sample(gpu, op, False, (shape,), 0.0, 1, 2.0 * float(np.prod(shape)) / tflops / 1e12)


def _layer(op: str, sizes: Mapping[str, int]) -> Shape | None:
    a, h, s, v, b = (sizes[key] for key in "ahsvb")
    shapes: dict[str, Shape] = {
        "qkv_transform": (b * s, 3 * h, h, 1), "attention_score": (s, s, h // a, a * b),
        "attention_over_value": (s, h // a, s, a * b), "attention_linear_projection": (b * s, h, h, 1),
        "mlp_h_to_4h": (b * s, 4 * h, h, 1), "mlp_4h_to_h": (b * s, h, 4 * h, 1), "logit_block": (b * s, v, h, 1),
    }  # fmt: skip
    return next((shape for name, shape in shapes.items() if op.startswith(name)), None)


def _profiled(row: Mapping[str, str], gpu: str) -> Iterator[Sample]:
    """Forward and backward of one op of a GPT layer with half-precision activations."""
    notes = row["notes"]
    model = re.findall(r"model (\S+)", notes)[0]
    b, tp, s = (int(re.findall(rf"{key}=?(\d+)", notes)[0]) for key in ("mbs", "tp", "seq"))
    h, a = MODELS[model.replace("_", ".")]
    times = [float(re.findall(rf"{key} us=([\d.]+)", notes)[0]) * 1e-6 for key in ("forward", "backward")]
    op = row["op"].removeprefix("enc-")
    for is_backward, time_s in zip((False, True), times, strict=True):
        gemms = _gpt_gemms(op, (b, tp, s, h, a))[is_backward]
        moved, kernels = _gpt_streams(op, (b, tp, s, h, a))[is_backward]
        if time_s >= SHORTEST_S and (gemms or moved):
            yield Sample(gpu, op, is_backward, gemms, moved, kernels, time_s)


def _gpt_gemms(op: str, sizes: tuple[int, ...]) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Forward's and backward's GEMMs; none where a collective is in the time."""
    b, tp, s, h, a = sizes
    rows, g, d = b * s, b * a // tp, h // a
    by_column = {"attention-qkv": (3 * h // tp, h), "MLP-GEMM-1": (4 * h // tp, h)}
    by_row = {"attention-dense": (h, h // tp), "MLP-GEMM-2": (h, 4 * h // tp)}
    if op in by_column or op in by_row:
        n, k = (by_column | by_row)[op]
        own, back = ((rows, n, k, 1),), ((rows, k, n, 1), (k, n, rows, 1))
        return own if tp == 1 or op in by_column else (), back if tp == 1 or op in by_row else ()
    if op == "attention-score":
        return ((s, s, d, g),), ((s, d, s, g), (d, s, s, g))
    if op == "attention-context":
        return ((s, d, s, g),), ((s, s, d, g), (s, d, s, g))
    return (), ()


def _gpt_streams(op: str, sizes: tuple[int, ...]) -> tuple[tuple[float, int], tuple[float, int]]:
    """Bytes that forward and backward move, and their kernels.

    The causal softmax reads half of its operand; dropout's mask is a byte per element; the dropout after attention
    and MLP is a bias, a dropout and an addition; biases' gradients are sums.
    """
    b, tp, s, h, a = sizes
    hidden, scores, inner = 2.0 * b * s * h, 2.0 * b * s * s * a / tp, 2.0 * b * s * 4 * h / tp
    found = {
        "1st-layernorm": ((3 * hidden, 1), (7 * hidden, 2)),
        "2nd-layernorm": ((3 * hidden, 1), (7 * hidden, 2)),
        "attention-softmax": ((1.5 * scores, 1), (2 * scores, 1)),
        "attention-dropout": ((2.5 * scores, 1), (2.5 * scores, 1)),
        "MLP-gelu": ((2 * inner, 1), (4 * inner, 2)),
        "post-attention-dropout": ((7.5 * hidden, 3), (3.5 * hidden, 2)),
        "post-MLP-dropout": ((7.5 * hidden, 3), (3.5 * hidden, 2)),
    }
    return found.get(op, ((0.0, 0), (0.0, 0)))


def predicted_s(spec: DeviceSpec, samples: list[Sample]) -> np.ndarray:
    """Seconds of samples that are all of one device."""
    owner = np.array([i for i, sample in enumerate(samples) for _ in sample.gemms], dtype=np.int64)
    shapes = np.array([shape for sample in samples for shape in sample.gemms], dtype=np.float64).reshape(-1, 4)
    m, n, k, g = shapes.T
    backward = np.array([sample.is_backward for sample in samples])[owner]
    computing = gemm_s(spec, "float16", shapes.T) / np.where(backward, backward_share(spec, "gemm"), 1.0)
    one = kernel_time_s(
        spec, "gemm", computing_s=computing, num_bytes=2.0 * g * (m * k + k * n + m * n), num_kernels=1.0
    )
    streams = kernel_time_s(
        spec, "other", computing_s=np.zeros(len(samples)), num_bytes=np.array([s.num_bytes for s in samples]),
        num_kernels=np.array([float(s.kernels) for s in samples]),
    )  # fmt: skip
    return np.bincount(owner, one, len(samples)) + streams


def fit(spec: DeviceSpec, samples: list[Sample]) -> dict[str, float]:
    """Efficiencies and depth with the least mean error over the GEMMs of one device."""
    gemms = [sample for sample in samples if sample.gemms]
    measured = np.array([sample.time_s for sample in gemms])
    has_backward = any(sample.is_backward for sample in gemms)
    efficiencies = np.arange(0.40, 0.96, 0.02)
    best: tuple[float, dict[str, float]] = (np.inf, {})
    for forward, backward, depth in itertools.product(
        efficiencies, efficiencies if has_backward else [0.0], (32.0, 64.0, 96.0, 128.0)
    ):
        numbers = {"gemm_efficiency": forward, "gemm_backward_efficiency": backward, "gemm_depth": depth}
        error = np.abs(np.log(predicted_s(replace(spec, **numbers), gemms) / measured)).mean()
        best = min(best, (float(error), numbers), key=lambda found: found[0])
    return {"mean_error": best[0], **{key: float(value) for key, value in best[1].items()}}


def errors(samples: list[Sample]) -> dict[tuple[str, str], np.ndarray]:
    """Signed relative errors by device and op."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for gpu in sorted({sample.gpu for sample in samples}):
        own = [sample for sample in samples if sample.gpu == gpu]
        for sample, time_s in zip(own, predicted_s(load_cluster(gpu, 1).spec, own), strict=True):
            name = sample.op + (" backward" if sample.is_backward else "")
            found[gpu, name].append(float(time_s / sample.time_s - 1))
    return {key: np.array(values) for key, values in sorted(found.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--gpu", default="", help="only rows of this device")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    samples = [sample for sample in read(arguments.csv) if arguments.gpu in ("", sample.gpu)]
    if not samples:
        print("no row with sizes and a time for this hardware", file=sys.stderr)
        return 2
    table = [
        {"gpu": gpu, "op": op, "rows": len(e), "signed": np.median(e), "median": np.median(abs(e)),
         "p90": np.quantile(abs(e), 0.9)}
        for (gpu, op), e in errors(samples).items()
    ]  # fmt: skip
    fits = {}
    if arguments.fit:
        for gpu in sorted({sample.gpu for sample in samples}):
            fits[gpu] = fit(load_cluster(gpu, 1).spec, [sample for sample in samples if sample.gpu == gpu])
    if arguments.json:
        print(json.dumps({"errors": table, "fits": fits}))
        return 0
    for row in table:
        print(
            f"{row['gpu']:16s} {row['op']:32s} {row['rows']:4d} rows  signed {row['signed']:+6.1%}  "
            f"median {row['median']:5.1%}  p90 {row['p90']:5.1%}"
        )
    for gpu, numbers in fits.items():
        print(gpu, ", ".join(f"{key} {value:.3g}" for key, value in numbers.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
