"""Contest instances of intra-operator parallelism: objective, bound and effort, each in a process of its own.

    python benchmarks/iopddl.py FILE... [--quick] [--json] [--time-limit 100]

FILE is an instance in the format of google/iopddl (`*.json.gz` or `*.json`). The time limit is wall time per file and
includes reading it. Exit code 3 if a file got no feasible choice.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.search.costnet.instance import read_instance
from autopar.search.costnet.solve import Outcome, solve

QUICK_S = 44.0
"""Wall time for all files together under --quick."""
START_S = 0.5
"""Wall time kept back per file for starting its process."""
GRACE_S = 4.0
"""Wall time after its limit at which a file's process is ended under --quick."""
NO_ANSWER = 3
UNKNOWN = dict.fromkeys(("objective", "bound", "gap", "excess", "cpu_s", "rss_bytes", "before", "after"))


def measure(path: Path, time_limit_s: float) -> dict[str, Any]:
    """Figures of one file, in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    instance = read_instance(path)
    outcome = solve(instance, time_limit_s=max(time_limit_s - (time.perf_counter() - wall), 0.0))
    return {
        "case": instance.name or path.name,
        "file": path.name,
        **_result(outcome),
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before": vars(outcome.before),
        "after": vars(outcome.after),
    }


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "objective": outcome.objective,
        "bound": outcome.bound if outcome.status != "infeasible" else None,
        "gap": outcome.gap if outcome.objective is not None else None,
        "excess": outcome.excess,
    }


def measure_apart(path: Path, time_limit_s: float, grace_s: float | None) -> dict[str, Any]:
    """Figures of one file from a fresh process, so that its memory is its own; raises CalledProcessError.

    A process that runs on for `grace_s` after its limit is ended, and the file has no answer.
    """
    command = [sys.executable, __file__, str(path), "--json", "--here", "--time-limit", str(time_limit_s)]
    began = time.perf_counter()
    try:
        timeout_s = None if grace_s is None else time_limit_s + grace_s
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        wall_s = time.perf_counter() - began
        return {"case": path.name, "file": path.name, "status": "no-solution", "wall_s": wall_s, **UNKNOWN}
    if done.returncode not in (0, NO_ANSWER):
        raise subprocess.CalledProcessError(done.returncode, command)
    row: dict[str, Any] = json.loads(done.stdout)["cases"][0]
    return row


def line(row: dict[str, Any]) -> str:
    """One line that ends in the objective, or in the smallest excess over the limit if there is none."""
    if row["before"] is None:
        return f"{row['case']:<24} {row['status']:<11} wall {row['wall_s']:.1f} s, ended at its limit: objective None"
    sizes = " -> ".join("{nodes}/{strategies}/{pairs}".format(**row[key]) for key in ("before", "after"))
    bound = "-" if row["bound"] is None else f"{row['bound']:.0f}"
    gap = "-" if row["gap"] is None else f"{row['gap']:.4%}"
    effort = f"cpu {row['cpu_s']:.1f} s wall {row['wall_s']:.1f} s rss {row['rss_bytes'] / 2**30:.2f} GiB"
    figure = f"objective {row['objective']}" if row["objective"] is not None else f"excess {row['excess']}"
    return f"{row['case']:<24} {row['status']:<11} {effort} sizes {sizes} bound {bound} gap {gap} {figure}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Objective, bound and effort on iopddl instances.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="instances: *.json.gz or *.json")
    parser.add_argument("--quick", action="store_true", help="all files together under 50 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time-limit", type=float, default=100.0, metavar="S", help="wall seconds per file")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    options = parser.parse_args()
    if not options.files:
        parser.error("give one FILE or more: instances of the google/iopddl format, e.g. asplos-2025-iopddl-B.json.gz")
    began = time.perf_counter()
    rows = []
    for k, path in enumerate(options.files):
        limit_s, grace_s = options.time_limit, None
        if options.quick:
            left_s = QUICK_S - (time.perf_counter() - began)
            limit_s = max(min(limit_s, left_s / (len(options.files) - k) - START_S), 0.0)
            grace_s = min(GRACE_S, max(left_s, 0.1))
        try:
            row = measure(path, limit_s) if options.here else measure_apart(path, limit_s, grace_s)
        except (InputError, OSError) as error:
            parser.exit(2, f"{error}\n")
        rows.append(row)
        if not options.json:
            print(line(row), flush=True)
    if options.json:
        print(json.dumps({"cases": rows}, indent=2))
    return 0 if all(row["objective"] is not None for row in rows) else NO_ANSWER


if __name__ == "__main__":
    sys.exit(main())
