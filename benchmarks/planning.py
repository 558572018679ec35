"""How long planning takes: wall time, peak memory and gap for each example, each in a process of its own.

    python benchmarks/planning.py [--quick] [--json] [--gpus 8] [NAME...]

Times leave out the imports of torch and transformers, which are printed as a case of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("gpt2", "llama", "bert", "vit", "resnet", "t5", "mixtral", "alexnet", "unet", "mlp")
QUICK = ("mlp", "gpt2")

CHILD = """
import json, resource, sys, time
began = time.perf_counter()
import torch, transformers
imports_s = time.perf_counter() - began
from autopar.ir.solution import Objective
from autopar.planner.plan import PlanRequest, plan_model
began = time.perf_counter()
plan = plan_model(sys.argv[1], {}, PlanRequest(int(sys.argv[2]), gpu="h100-sxm-80gb", objective=Objective("energy")))
wall_s = time.perf_counter() - began
decisions = plan.decisions
print(json.dumps({
    "wall_s": wall_s, "imports_s": imports_s, "search_s": plan.solver.wall_s, "gap": plan.solver.gap,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "num_gpus": decisions.num_gpus,
    "mesh": [len(decisions.stages), *decisions.mesh.sizes], "num_microbatches": decisions.num_microbatches,
}))
"""


def measure(name: str, num_gpus: int) -> dict[str, Any]:
    """Figures of one planning run in a fresh process; raises CalledProcessError if it fails."""
    command = [sys.executable, "-c", CHILD, str(ROOT / "examples" / f"{name}.py"), str(num_gpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"case": f"{name}-{num_gpus}", **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Planning time of the examples.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples; default: all ten")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="two small examples, under 50 s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.names or (QUICK if options.quick else NAMES)
    rows = []
    for name in names:
        row = measure(name, options.gpus)
        rows.append(row)
        if not options.json:
            mesh = "x".join(map(str, row["mesh"]))
            text = f"{row['case']:<12} pp x mesh {mesh:<8} m {row['num_microbatches']:<3} gap {row['gap']:.3%}"
            peak = row["peak_bytes"] / 2**30
            print(f"{text} peak {peak:.2f} GiB imports {row['imports_s']:.1f} s plan {row['wall_s']:.2f} s", flush=True)
    if options.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
