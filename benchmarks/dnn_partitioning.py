"""Largest load of the best contiguous partition of graphs in the dnn-partitioning format (JSON), with bound and time.

    python benchmarks/dnn_partitioning.py FILE... [--quick] [--json] [--time-limit 60]

A file holds `maxFPGAs` (accelerators), `maxCPUs`, `maxSizePerFPGA` (bytes), `nodes` (id, supportedOnFpga, fpgaLatency,
cpuLatency, isBackwardNode, colorClass, size) and `edges` (sourceId, destId, cost). Times are printed in the file's own
unit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from autopar.search.partition import PartitionEdge, PartitionNode, PartitionProblem, partition_graph

SAME_COST = 1e-6
"""Costs of one producer that differ by no more, in the file's unit, are one cost."""
QUICK_S = 8.0
"""Time limit per file with --quick."""


def read_problem(path: Path) -> PartitionProblem:
    """The problem in a file; its time unit is taken for seconds."""
    data = json.loads(path.read_text())
    index = {node["id"]: position for position, node in enumerate(data["nodes"])}
    nodes = tuple(
        PartitionNode(
            accelerator_s=float(node["fpgaLatency"]) if node["supportedOnFpga"] else None,
            cpu_s=float(node["cpuLatency"]),
            size_bytes=float(node.get("size", 0.0)),
            is_backward=bool(node.get("isBackwardNode", False)),
            colour=node.get("colorClass"),
        )
        for node in data["nodes"]
    )
    costs: dict[int, float] = {}
    for edge in data["edges"]:
        known = costs.setdefault(edge["sourceId"], float(edge["cost"]))
        if abs(known - edge["cost"]) > SAME_COST:
            raise SystemExit(f"{path}: node {edge['sourceId']} has edges with different costs")
    edges = tuple(PartitionEdge(index[e["sourceId"]], index[e["destId"]], costs[e["sourceId"]]) for e in data["edges"])
    return PartitionProblem(nodes, edges, data["maxFPGAs"], data.get("maxCPUs", 0), float(data["maxSizePerFPGA"]))


def measure(path: Path, time_limit_s: float) -> dict[str, Any]:
    """Figures of one file."""
    problem = read_problem(path)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = partition_graph(problem, time_limit_s=time_limit_s)
    return {
        "case": f"{path.parent.name}/{path.stem}",
        "nodes": len(problem.nodes),
        "edges": len(problem.edges),
        "accelerators": problem.num_accelerators,
        "ideals": result.num_ideals,
        "method": result.method,
        "status": result.status,
        "bound": result.bound_s,
        "gap": result.gap,
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.perf_counter() - wall_s,
        "max_load": result.load_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Contiguous partition with the smallest largest load.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK_S:g} s per file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="per file; default 60")
    options = parser.parse_args()
    time_limit_s = min(QUICK_S, options.time_limit) if options.quick else options.time_limit
    rows = []
    for path in options.files:
        row = measure(path, time_limit_s)
        rows.append(row)
        if not options.json:
            ideals = row["ideals"] or "many"
            size = f"{row['case']:<36} {row['nodes']:>4} nodes k {row['accelerators']:<2} ideals {ideals:>6}"
            proof = f"{row['method']:<15} {row['status']:<9} bound {row['bound']:.4f} gap {row['gap']:.4%}"
            used = f"cpu {row['cpu_s']:.2f} s wall {row['wall_s']:.2f} s"
            print(f"{size} {proof} {used} max-load {row['max_load']:.4f}", flush=True)
    if options.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
