"""Every example model under its own plan and under pinned ones, compared with the serial model on real processes.

    python benchmarks/verify_matrix.py [--quick] [--json] [--processes 2,4] [--models gpt2,llama]

Each line is one (model, pins, processes) with the largest relative error of the loss and of any gradient, in float64.
Prints one line per case ending in that figure; exit code 4 if any is above 1e-10.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan
from autopar.ir.solution import Objective, Pins
from autopar.planner.execute import FLOAT64_TOLERANCE, verify_worker
from autopar.planner.plan import PlanRequest, plan_model
from autopar.runtime.launch import Job, launch_local

ROOT = Path(__file__).resolve().parent.parent
CHOSEN_BATCH = 256
"""Large enough that splitting these small models pays, so that the planner's own choice is not to replicate."""
TEXT = {"layers": "4", "hidden": "64", "heads": "4", "vocab": "128", "seq": "16", "batch": "8"}
IMAGES = {"batch": "8", "classes": "8"}
MODELS: dict[str, dict[str, str]] = {
    "gpt2": TEXT,
    "llama": {**TEXT, "kv_heads": "4", "ffn": "128", "dtype": "float32"},
    "bert": TEXT,
    "vit": {"layers": "4", "hidden": "64", "heads": "4", "image": "32", "patch": "8", **IMAGES},
    "resnet": {"layers": "3", "width": "8", "image": "64", **IMAGES},
    "t5": {**TEXT, "ffn": "128", "target": "8"},
    "mixtral": {**TEXT, "layers": "2", "kv_heads": "4", "ffn": "128", "experts": "4", "dtype": "float32"},
    "alexnet": {"width": "8", "hidden": "32", "image": "64", **IMAGES},
    "unet": {"width": "8", "levels": "3", "image": "16", "norm": "batch", **IMAGES},
    "mlp": {"inputs": "32", "hidden": "64", "code": "16", "batch": "8"},
}
PINS_BY_PROCESSES: dict[int, dict[str, Pins]] = {
    2: {
        "chosen": Pins(),
        "data": Pins(dp=2, tp=1, pp=1),
        "tensor": Pins(dp=1, tp=2, pp=1),
        "pipeline": Pins(dp=1, tp=1, pp=2, num_microbatches=2),
        "zero3": Pins(dp=2, tp=1, pp=1, zero=3, num_microbatches=2),
    },
    4: {
        "chosen": Pins(),
        "data": Pins(dp=4, tp=1, pp=1),
        "tensor": Pins(dp=1, tp=4, pp=1),
        "pipeline": Pins(dp=1, tp=1, pp=4, num_microbatches=4),
        "data x tensor": Pins(dp=2, tp=2, pp=1),
        "data x pipeline": Pins(dp=2, tp=1, pp=2, num_microbatches=2, schedule="gpipe"),
        "tensor x pipeline": Pins(dp=1, tp=2, pp=2, num_microbatches=4, recompute="full"),
    },
}


def make(name: str, pins: Pins, processes: int) -> Plan:
    """The fastest plan of an example on exactly so many processes of this kind of machine."""
    batch = CHOSEN_BATCH if pins == Pins() else None
    request = PlanRequest(
        batch_size=batch, num_gpus=processes, gpu="h100-sxm-80gb", objective=Objective("time"), pins=pins, use_all=True
    )
    source = os.path.relpath(ROOT / "examples" / f"{name}.py")
    return plan_model(source, MODELS[name], request)


def worker(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One rank: verify the plans one after another."""
    return [verify_worker({**arguments, "plan": plan}) for plan in arguments["plans"]]


def verify(plans: list[Plan], processes: int) -> list[dict[str, Any] | str]:
    """Reports of the plans in one launch; where that fails, each by itself with its error instead."""
    arguments = {"plans": [dump_plan(p) for p in plans], "dtype": "float64", "tolerance": FLOAT64_TOLERANCE}
    try:
        reports: list[dict[str, Any] | str] = launch_local(
            Job("benchmarks.verify_matrix:worker", arguments, processes), timeout_s=120 + 30 * len(plans)
        )[0]
    except AutoparError as error:
        return [str(error)] if len(plans) == 1 else [verify([plan], processes)[0] for plan in plans]
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, two processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--models", default=",".join(MODELS))
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    names = ["mlp", "gpt2"] if arguments.quick else arguments.models.split(",")
    counts = [2] if arguments.quick else [int(n) for n in arguments.processes.split(",")]
    rows = [row for name in names for count in counts for row in check(name, count)]
    for row in rows if arguments.json else []:
        print(json.dumps(row))
    return 0 if all(row["passed"] for row in rows) else 4


def check(name: str, processes: int) -> list[dict[str, Any]]:
    """All pins of one model on so many processes."""
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    plans: dict[str, Plan] = {}
    for label, pins in PINS_BY_PROCESSES[processes].items():
        try:
            plans[label] = make(name, pins, processes)
        except AutoparError as error:
            rows.append(show({"model": name, "processes": processes, "pins": label, "error": f"no plan: {error}"}))
    for (label, plan), report in zip(plans.items(), verify(list(plans.values()), processes), strict=True):
        mesh = "x".join(map(str, plan.decisions.mesh.sizes))
        shown = {"model": name, "processes": processes, "pins": label, "stages": len(plan.decisions.stages)}
        shown |= {"mesh": mesh, "microbatches": plan.decisions.num_microbatches}
        found = {"error": report} if isinstance(report, str) else report
        rows.append(show({**shown, **found}))
    print(f"  {name} on {processes}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return rows


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print one row; `passed` is added."""
    worst = max(row.get("loss_error", 0.0), row.get("worst_gradient_error", 0.0))
    passed = "error" not in row and worst <= FLOAT64_TOLERANCE
    figure = row["error"].splitlines()[-1][:300] if "error" in row else f"{worst:.1e}"
    layout = f"pp={row.get('stages', '-')} mesh={row.get('mesh', '-')} m={row.get('microbatches', '-')}"
    print(f"{row['model']:8} {row['processes']} {row['pins']:18} {layout:24} {'ok' if passed else 'FAIL'} {figure}")
    sys.stdout.flush()
    return {**row, "passed": passed}


if __name__ == "__main__":
    sys.exit(main())
