"""Loss curves of a small GPT-2 under plans of every family, over the serial curve of the same batches.

    python benchmarks/loss_curves.py [--quick] [--json] [--steps 200] [--plans data,tensor] [--plot FILE.svg]

Every step trains on another batch of a made-up language (each token follows from the one before, but for every eighth),
in float32 with AdamW, on two or four gloo processes. A line ends in the relative difference from the serial loss at the
last step. Exit code 4: it is above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopar.errors import VerifyError
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Pins
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.report.figure import check_plot, save_figure
from autopar.runtime.launch import Job, launch_local

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"layers": "4", "hidden": "64", "heads": "4", "seq": "32", "vocab": "64", "batch": "8", "dropout": "0"}
PLANS: Mapping[str, Pins] = {
    "serial": Pins(dp=1, tp=1, pp=1),
    "data": Pins(dp=2, tp=1, pp=1),
    "zero-3": Pins(dp=2, tp=1, pp=1, zero=3, num_microbatches=2),
    "tensor": Pins(dp=1, tp=2, pp=1),
    "pipeline": Pins(dp=1, tp=1, pp=2, num_microbatches=4),
    "data x tensor": Pins(dp=2, tp=2, pp=1),
    "data x pipeline": Pins(dp=2, tp=1, pp=2, num_microbatches=2),
    "tensor x pipeline": Pins(dp=1, tp=2, pp=2, num_microbatches=4, recompute="full"),
}
TOLERANCE = 1e-4
LEARNING_RATE = 1e-3
NOISE = 8


def make(pins: Pins) -> Plan:
    """The fastest plan under pins on as many processes as they need."""
    count = (pins.dp or 1) * (pins.tp or 1) * (pins.pp or 1)
    request = PlanRequest(num_gpus=count, gpu="h100-sxm-80gb", pins=pins, use_all=True, with_baselines=False)
    return plan_model(os.path.relpath(ROOT / "examples" / "gpt2.py"), OPTIONS, request)


def worker(arguments: Mapping[str, Any]) -> list[float]:
    """One rank: the loss of every step."""
    import torch

    from autopar.planner.assemble import make_executor
    from autopar.planner.execute import prepare, run_options
    from autopar.runtime.executor import OptimizerOptions, join_plan

    plan = parse_plan(arguments["plan"])
    ready = prepare(plan, "cpu")
    options = replace(run_options(plan, "cpu"), optimizer=OptimizerOptions(learning_rate=LEARNING_RATE))
    mesh = join_plan(ready.captured.graph, plan.decisions, "cpu")
    executor = make_executor(ready.captured.graph, plan.decisions, ready.state, mesh, options)
    assert all(tensor.dtype == torch.float32 for tensor in ready.state.values() if tensor.is_floating_point())
    return [executor.step([_tokens(step)] * len(ready.batch)) for step in range(arguments["steps"])]


def _tokens(step: int) -> Any:
    """Sequences in which a token is five times the one before plus one, modulo the vocabulary, but for a few."""
    import torch

    samples, length, vocab = (int(OPTIONS[name]) for name in ("batch", "seq", "vocab"))
    generator = torch.Generator().manual_seed(step)
    jumps = torch.randint(vocab, (samples, length), generator=generator)
    is_jump = torch.randint(NOISE, (samples, length), generator=generator) == 0
    tokens = jumps.clone()
    for i in range(1, length):
        tokens[:, i] = torch.where(is_jump[:, i], jumps[:, i], (5 * tokens[:, i - 1] + 1) % vocab)
    return tokens


def curve(plan: Plan, steps: int) -> list[float]:
    """Losses of the plan's processes."""
    job = Job("benchmarks.loss_curves:worker", {"plan": dump_plan(plan), "steps": steps}, plan.decisions.num_gpus)
    losses: list[float] = launch_local(job, timeout_s=120 + 10 * steps)[0]
    return losses


def draw(curves: Mapping[str, Sequence[float]], path: str) -> None:
    """The curves on top of one another, and below how far each is from the serial one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    serial = curves["serial"]
    above.plot(range(1, len(serial) + 1), serial, color="0.2", linewidth=4, alpha=0.3, label="serial")
    for name, losses in curves.items():
        if name != "serial":
            steps = range(1, len(losses) + 1)
            above.plot(steps, losses, linewidth=0.8, label=name)
            below.semilogy(steps, [abs(a - b) / b + 1e-9 for a, b in zip(losses, serial, strict=True)], linewidth=0.8)
    below.axhline(TOLERANCE, color="0.5", linestyle=":")
    above.set(ylabel="loss (measured)", title="GPT-2 on gloo processes, float32, AdamW")
    below.set(xlabel="step", ylabel="relative difference from serial")
    above.legend(fontsize=8)
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps of two plans")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--plot", help="file to draw, e.g. loss_curves.svg")
    arguments = parser.parse_args()
    names = ["data", "tensor"] if arguments.quick else arguments.plans.split(",")
    steps = 20 if arguments.quick else arguments.steps
    if arguments.plot:
        check_plot()
    curves = {"serial": curve(make(PLANS["serial"]), steps)}
    worst = 0.0
    for name in (name for name in names if name != "serial"):
        plan = make(PLANS[name])
        curves[name] = curve(plan, steps)
        differences = [abs(a - b) / b for a, b in zip(curves[name], curves["serial"], strict=True)]
        worst = max(worst, differences[-1])
        if not arguments.json:
            ends = f"loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f}, largest difference {max(differences):.1e}"
            print(
                f"{name:18} {plan.decisions.num_gpus} processes, {ends}, at the end {differences[-1]:.1e}", flush=True
            )
    if arguments.json:
        print(json.dumps({"steps": steps, "losses": curves, "largest_final_difference": worst}))
    if arguments.plot:
        draw(curves, arguments.plot)
    return 0 if worst <= TOLERANCE else VerifyError.exit_code


if __name__ == "__main__":
    sys.exit(main())
