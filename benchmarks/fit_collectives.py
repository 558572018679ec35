"""Hold the prices of collectives against measured ones, and fit the links of `costmodels/` anew.

    python benchmarks/fit_collectives.py collectives.csv [--gpu NAME] [--network RATE] [--quick] [--json]

The CSV has columns hardware, collective, n_gpus, n_nodes, algo, notes, size_bytes and time_us (or busbw_GBps), as in
sweeps of nccl-tests. For every hardware, collective, number of GPUs and of nodes it prints the relative error of
`collective_cost` with the device file's numbers, over sizes from 1 MiB. `SETUPS` says which device a hardware is;
`--gpu` (and `--network`) name it for all others. Then, for every device with rows from one node, the parameters that a
weighted least-squares fit finds (octaves of sizes count alike), beside those of the device file:

    time = latency + hop steps (n-1) + (passes (n-1) + fill) / n * bytes / (bandwidth * share of the topology)

and, from rows with in-switch reduction, its rate. Rows of all_reduce with `Ring` in algo, or NVLS off, are priced
without it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.cli.quantities import parse_rate
from autopar.cost.collective import collective_cost
from autopar.cost.hardware import Cluster, load_cluster
from autopar.cost.topology import ring_share
from autopar.ir.mesh import Group
from autopar.units import GB, MIB

SMALLEST_BYTES = MIB
WORST_S = 1e3
"""Longer times are marks of failed runs."""
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
SHARED_NETWORK_RANKS = 32


@dataclass(frozen=True)
class Setup:
    """What a hardware text means.

    Attributes:
        start: how the text begins.
        topology: where GPUs are numbered otherwise than in the device file.
        network_bytes_per_s: of a node, where it is not the device file's.
        has_copies: times include what torch.distributed's list interfaces copy, and the size of an all_gather is that
            of one rank's part. Some sizes are split along an inner dimension, which copies more: rows slower than one
            of a larger size are left out.
    """

    start: str
    gpu: str
    topology: str = ""
    network_bytes_per_s: float | None = None
    has_copies: bool = False


SETUPS = (
    Setup("V100-32GB node (Aceso)", "v100-sxm2-32gb", topology="nvlink-mesh-paired", has_copies=True),
    Setup("V100", "v100-sxm2-32gb"),
    Setup("A100", "a100-sxm-80gb"),
    Setup("H200", "h200-sxm-141gb"),
    Setup("H100", "h100-sxm-80gb"),
    Setup("B200", "b200-sxm-180gb"),
    # An example output without a name; its plateau of 92 GB/s is that of A100 nodes with 800 Gb/s.
    Setup("4 nodes, hardware not named", "a100-sxm-80gb", network_bytes_per_s=100 * GB),
)


@dataclass(frozen=True)
class Row:
    """One measurement. `in_switch`: the switch may add; `size_bytes` as `collective_cost` counts it."""

    hardware: str
    kind: str
    ranks: int
    nodes: int
    size_bytes: float
    time_s: float
    in_switch: bool
    setup: Setup

    @property
    def cluster(self) -> Cluster:
        cluster = load_cluster(
            self.setup.gpu,
            self.ranks,
            self.ranks // self.nodes if self.nodes > 1 else None,
            network_bytes_per_s=self.setup.network_bytes_per_s,
        )
        link = cluster.spec.intra_node
        spec = replace(
            cluster.spec,
            topology=self.setup.topology or cluster.spec.topology,
            intra_node=link if self.in_switch else replace(link, reduction_bytes_per_s=0.0),
        )
        return replace(cluster, spec=spec)

    @property
    def copies_s(self) -> float:
        """Time of copying the parts together or apart: the whole value read and written once."""
        if not self.setup.has_copies or self.kind == "all_reduce":
            return 0.0
        spec = self.cluster.spec
        return 2 * self.size_bytes / (spec.memory_bytes_per_s * spec.memory_efficiency)


def read(path: Path, default: Setup | None = None) -> list[Row]:
    """Rows of known hardware from 1 MiB; a time that is not given is derived from the bus bandwidth."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for line in csv.DictReader(file) if (row := _row(line, default)) is not None]
    plain = [row for row in rows if not row.setup.has_copies]
    copied = [rows for _, rows in groups([row for row in rows if row.setup.has_copies])]
    return plain + [row for some in copied for row in _rising(some)]


def _rising(rows: list[Row]) -> list[Row]:
    """Rows that are no slower than any of a larger size."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: row.size_bytes, reverse=True):
        if not kept or row.time_s <= kept[-1].time_s:
            kept.append(row)
    return kept


def _row(line: dict[str, str], default: Setup | None) -> Row | None:
    kind, _, remark = line["collective"].replace("-", "_").partition(",")
    setup = next((s for s in SETUPS if line["hardware"].startswith(s.start)), default)
    size = float(line["size_bytes"] or 0)
    if setup is None or kind not in PASSES or size < SMALLEST_BYTES:
        return None
    nodes = int(line["n_nodes"] or 1)
    ranks = int(line["n_gpus"] or (SHARED_NETWORK_RANKS if nodes > 1 else 0))
    if setup.has_copies and kind == "all_gather":
        size *= ranks
    if line["time_us"]:
        time_s = float(line["time_us"]) * 1e-6
    elif line["busbw_GBps"] and float(line["busbw_GBps"]) > 0:
        time_s = PASSES[kind] * (ranks - 1) / ranks * size / (float(line["busbw_GBps"]) * GB)
    else:
        return None
    in_switch = "Ring" not in line["algo"] and not remark.endswith("=0")
    return Row(line["hardware"], kind, ranks, nodes, size, time_s, in_switch, setup) if time_s < WORST_S else None


def groups(rows: list[Row]) -> Iterator[tuple[tuple[str, str, int, int], list[Row]]]:
    """Rows by hardware, collective, ranks and nodes, sorted."""
    found: dict[tuple[str, str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.hardware, row.kind, row.ranks, row.nodes].append(row)
    yield from sorted(found.items())


def errors(rows: list[Row]) -> NDArray[np.float64]:
    """Relative error of the price of each row; negative: too cheap."""
    cost = {
        flag: collective_cost(replace(rows[0], in_switch=flag).cluster, rows[0].kind, Group(rows[0].ranks, 1))
        for flag in {row.in_switch for row in rows}
    }
    priced = [cost[row.in_switch].time_s(row.size_bytes) + row.copies_s for row in rows]
    return np.asarray(priced) / np.asarray([row.time_s for row in rows]) - 1


def fit(rows: list[Row]) -> dict[str, float]:
    """Parameters of one device's links inside a node, from all rows of one node that run on rings."""
    columns, times, weights = [], [], []
    for row in rows:
        n, passes, cluster = row.ranks, PASSES[row.kind], row.cluster
        step = row.size_bytes / n / ring_share(cluster.spec.topology, n, 1, cluster.gpus_per_node)
        columns.append((1.0, passes / 2 * (n - 1), passes * (n - 1) * step, step))
        times.append(row.time_s)
        weights.append(row.size_bytes**-0.5 / row.time_s)
    design, target, weight = np.asarray(columns), np.asarray(times), np.asarray(weights)
    a, h, slope, fill = _least_squares(design * weight[:, None], target * weight)
    found = {"latency_s": a, "latency_per_hop_s": h}
    return {**found, "bandwidth_bytes_per_s": 1 / slope if slope else 0.0, "ring_fill": fill / slope if slope else 0.0}


def _least_squares(design: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares without negative parameters: those that would be are left out, the most negative first."""
    kept = list(range(design.shape[1]))
    found = np.zeros(design.shape[1])
    while kept:
        part = np.linalg.lstsq(design[:, kept], target, rcond=None)[0]
        if part.min() >= 0:
            found[kept] = part
            break
        kept.pop(int(np.argmin(part)))
    return found


def fit_reduction(rows: list[Row], latency_per_hop_s: float) -> dict[str, float]:
    """Rate of in-switch reduction, and the fixed part less that of the hops."""
    design = np.asarray([(1.0, (row.ranks + 1) / row.ranks * row.size_bytes) for row in rows])
    target = np.asarray([row.time_s - latency_per_hop_s * (row.ranks - 1) for row in rows])
    weight = np.asarray([1 / row.time_s for row in rows])
    latency_s, slope = _least_squares(design * weight[:, None], target * weight)
    return {"latency_s": latency_s, "reduction_bytes_per_s": 1 / slope}


def report_errors(rows: list[Row]) -> list[dict[str, Any]]:
    found = []
    for (hardware, kind, ranks, nodes), some in groups(rows):
        error = np.abs(errors(some))
        found.append(
            {
                "hardware": hardware,
                "collective": kind,
                "n_gpus": ranks,
                "n_nodes": nodes,
                "rows": len(some),
                "median_error": float(np.median(error)),
                "p90_error": float(np.quantile(error, 0.9)),
            }
        )
    return found


def report_fits(rows: list[Row]) -> list[dict[str, Any]]:
    """The fit of every device with rows of one node, beside the numbers of its file."""
    found = []
    for gpu in sorted({row.setup.gpu for row in rows}):
        own = [row for row in rows if row.setup.gpu == gpu and row.nodes == 1 and not row.setup.has_copies]
        link = load_cluster(gpu, 1).spec.intra_node
        switched = [row for row in own if link.reduction_bytes_per_s and row.in_switch and row.kind == "all_reduce"]
        ring = [row for row in own if row not in switched]
        fitted = fit(ring) if len({row.size_bytes for row in ring}) > 3 else {}
        if switched:
            fitted |= fit_reduction(switched, link.latency_per_hop_s)
        found.append({"gpu": gpu, "fitted": fitted, "file": asdict(link)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--gpu", help="device of hardware that SETUPS does not know")
    parser.add_argument("--network", type=parse_rate, help="all ports of a node of that device, e.g. 800Gbit/s")
    parser.add_argument("--quick", action="store_true", help="every eighth row of a sweep")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    default = Setup("", arguments.gpu, network_bytes_per_s=arguments.network) if arguments.gpu else None
    rows = read(arguments.csv, default)
    if arguments.quick:
        rows = [row for _, some in groups(rows) for row in (some[::8] if len(some) > 64 else some)]
    every, fits = report_errors(rows), report_fits(rows)
    medians = [group["median_error"] for group in every]
    whole = np.abs(np.concatenate([errors(some) for _, some in groups(rows)]))
    summary = {
        "rows": len(rows),
        "groups": len(every),
        "median_error": float(np.median(whole)),
        "p90_error": float(np.quantile(whole, 0.9)),
        "median_of_groups": float(np.median(medians)),
        "worst_group": max(medians),
    }
    if arguments.json:
        print(json.dumps({"groups": every, "fits": fits, "summary": summary}, indent=1))
        return 0
    for g in every:
        print(
            f"{g['hardware'][:44]:44} {g['collective']:14} {g['n_gpus']:3} GPUs {g['n_nodes']} nodes "
            f"{g['rows']:5} rows median {g['median_error']:6.1%} p90 {g['p90_error']:6.1%}"
        )
    for f in fits:
        for key, value in f["fitted"].items():
            print(f"{f['gpu']:20} {key:24} fitted {value:10.4g} file {f['file'][key]:10.4g}")
    print(
        f"{summary['rows']} rows in {summary['groups']} groups: median {summary['median_error']:.1%}, "
        f"p90 {summary['p90_error']:.1%}; groups: median {summary['median_of_groups']:.1%}, "
        f"worst {summary['worst_group']:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
