"""Predicted against measured step time and peak memory of plans on this machine's CPU.

    python benchmarks/cpu_truth.py [MODEL...] [--quick] [--json] [--profile FILE]

Each model is profiled (as `autopar profile --device cpu` does), planned under several pins with that profile, and
trained for real by two gloo processes of one thread each. All plans of a model take turns, step by step. A step counts
if the processes hardly waited for a core meanwhile (the scheduler's own count), so that other programs on the machine
do not count as the plan's; where few were so lucky the calmer half counts, and the line says how disturbed it was.

Memory is what torch's allocator had handed out at the worst moment of two steps, to the byte, without the batch (which
was there before); growth of resident
memory stands beside it (it includes the allocator's slack and the buffers of gloo).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.solution import Pins
from autopar.planner.plan import capture_graph, make_plan
from autopar.planner.profile import ProfileRequest, profile_file
from autopar.planner.request import PlanRequest
from autopar.runtime.launch import Job, launch_local

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
CALM = 0.03
"""Largest share of a step that a process may have waited for a core."""
WANTED, LEAST = 20, 5
"""Calm steps of each plan, after which measuring ends; steps of each that are taken however long they last."""
LOOK_S, IDLE = 0.1, 0.15
"""How long the machine must be idle before a step, and the share of its cores that may be busy then."""


@dataclass(frozen=True)
class Model:
    """What is trained, and the plans of it by name."""

    source: str
    options: Mapping[str, str]
    plans: Mapping[str, Pins]


DATA = {"dp": 2, "tp": 1, "pp": 1, "zero": 0}
TENSOR = {"dp": 1, "tp": 2, "pp": 1}
PIPELINE = {"dp": 1, "tp": 1, "pp": 2}
MODELS = {
    "gpt": Model(
        "examples/gpt2.py",
        {"layers": "4", "hidden": "384", "heads": "6", "seq": "256", "vocab": "2048", "batch": "8"},
        {
            "data": Pins(**DATA, num_microbatches=1),
            "data-m4": Pins(**DATA, num_microbatches=4),
            "tensor": Pins(**TENSOR, num_microbatches=1),
            "pipeline-m4": Pins(**PIPELINE, num_microbatches=4),
            "gpipe-m2": Pins(**PIPELINE, num_microbatches=2, schedule="gpipe"),
            "zero3": Pins(**{**DATA, "zero": 3}, num_microbatches=1),
            "zero1-recompute-m2": Pins(**{**DATA, "zero": 1}, num_microbatches=2, recompute="full"),
        },
    ),
    "mlp": Model(
        "benchmarks/plain_mlp.py",
        {"width": "1024", "layers": "8", "batch": "1024"},
        {
            "data": Pins(**DATA, num_microbatches=1),
            "data-m4": Pins(**DATA, num_microbatches=4),
            "tensor": Pins(**TENSOR, num_microbatches=1),
            "pipeline-m8": Pins(**PIPELINE, num_microbatches=8),
            "pipeline-m2": Pins(**PIPELINE, num_microbatches=2),
            "zero3": Pins(**{**DATA, "zero": 3}, num_microbatches=1),
        },
    ),
    "vit": Model(
        "examples/vit.py",
        {"layers": "4", "hidden": "256", "heads": "4", "image": "96", "patch": "8", "classes": "100", "batch": "16"},
        {
            "data": Pins(**DATA, num_microbatches=1),
            "tensor": Pins(**TENSOR, num_microbatches=1),
            "pipeline-m4": Pins(**PIPELINE, num_microbatches=4),
            "pipeline-recompute-m4": Pins(**PIPELINE, num_microbatches=4, recompute="full"),
            "zero3-m2": Pins(**{**DATA, "zero": 3}, num_microbatches=2),
        },
    ),
}
QUICK_MODEL = Model(
    "benchmarks/plain_mlp.py",
    {"width": "768", "layers": "4", "batch": "512"},
    {
        "data": Pins(**DATA, num_microbatches=1),
        "tensor": Pins(**TENSOR, num_microbatches=1),
        "pipeline-m4": Pins(**PIPELINE, num_microbatches=4),
    },
)
QUICK_S = 6.0


@dataclass(frozen=True)
class Case:
    """One plan: seconds and bytes; bytes of every rank. `disturbed` is the share of the steps that count which a
    process waited for a core, `num_steps` how many count.
    """

    model: str
    plan: str
    predicted_s: float
    measured_s: float
    predicted_bytes: tuple[float, ...]
    measured_bytes: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    disturbed: float
    num_steps: int

    @property
    def time_error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_errors(self) -> tuple[float, ...]:
        """Of each rank's peak, above 0 where predicted too high."""
        return tuple(p / m - 1 for p, m in zip(self.predicted_bytes, self.measured_bytes, strict=True))

    def __str__(self) -> str:
        pairs = zip(self.predicted_bytes, self.measured_bytes, self.resident_bytes, strict=True)
        memory = ", ".join(f"{p / 1e6:.1f}/{m / 1e6:.1f} ({r / 1e6:.0f})" for p, m, r in pairs)
        low, high = min(self.memory_errors), max(self.memory_errors)
        return (
            f"{self.model} {self.plan}: predicted/measured {self.predicted_s:.3f}/{self.measured_s:.3f} s "
            f"({self.num_steps} steps, {self.disturbed:.0%} disturbed), "
            f"MB (resident) {memory}, memory {low:+.1%} to {high:+.1%}, time {self.time_error:+.1%}"
        )


def worker(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One rank: peaks of every plan, then steps in turn until enough were calm or time is over."""
    import torch

    from autopar.planner.assemble import make_executor
    from autopar.planner.execute import prepare, run_options
    from autopar.runtime.executor import join_plan

    torch.set_num_threads(1)
    ready, found = {}, {}
    for name, text in arguments["plans"].items():
        plan = parse_plan(text)
        prepared = prepare(plan, "cpu")
        mesh = join_plan(prepared.captured.graph, plan.decisions, "cpu")

        def make(prepared: Any = prepared, plan: Plan = plan, mesh: Any = mesh) -> Any:
            options = run_options(plan, "cpu")
            return make_executor(prepared.captured.graph, plan.decisions, prepared.state, mesh, options)

        found[name] = _peaks(make, prepared.batch)
        if arguments["seconds"]:
            ready[name] = (make(), prepared.batch)
        del prepared, make
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for executor, batch in ready.values():
        executor.step(batch)  # the first of a run is slower
    deadline = time.monotonic() + arguments["seconds"]
    while ready and (name := _next_plan(steps, deadline)) is not None:
        steps[name].append(_timed_step(*ready[name]))
    return {name: {**found[name], "steps": steps[name]} for name in found}


def _next_plan(steps: Mapping[str, Sequence[tuple[float, float]]], deadline: float) -> str | None:
    """Rank 0 waits until the machine is idle and names the plan with the fewest steps; None ends it."""
    import torch.distributed as dist

    calm = {name: sum(share <= CALM for _, share in found) for name, found in steps.items()}
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        _wait_for_idle(deadline)
        is_late = time.monotonic() > deadline
        counts = {name: len(found) for name, found in steps.items()}
        if min(calm.values()) < WANTED and not (is_late and min(counts.values()) >= LEAST):
            chosen = [min(steps, key=counts.__getitem__)]
    dist.broadcast_object_list(chosen, 0)
    return chosen[0]


def _wait_for_idle(deadline: float) -> None:
    """Until all cores were idle for a moment, or the deadline."""

    def busy_s() -> float:
        user, nice, system, *_ = (int(part) for part in Path("/proc/stat").read_text().split()[1:5])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    while True:
        before = busy_s()
        time.sleep(LOOK_S)
        if busy_s() - before <= IDLE * LOOK_S * (os.cpu_count() or 1) or time.monotonic() > deadline:
            return


def _peaks(make: Any, batch: Sequence[Any]) -> dict[str, int]:
    """Live bytes and growth of resident memory over making an executor and two steps."""
    from autopar.profiler.live import LiveBytes

    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    executor = make()
    for _ in range(2):
        executor.step(batch)
    resident = _status_bytes("VmHWM") - before
    del executor
    gc.collect()
    with LiveBytes() as live:
        executor = make()
        for _ in range(2):
            executor.step(batch)
    del executor
    gc.collect()
    return {"live": live.peak_bytes, "resident": resident}


def _status_bytes(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(name + ":")))


def _timed_step(executor: Any, batch: Sequence[Any]) -> tuple[float, float]:
    """Seconds of a step until all ranks are done, and the larger share of it that a rank waited for a core."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    waited, began = _waited_s(), time.perf_counter()
    executor.step(batch)
    dist.barrier()
    seconds, waited = time.perf_counter() - began, _waited_s() - waited
    both = torch.tensor([seconds, waited / seconds], dtype=torch.float64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return float(both[0]), float(both[1])


def _waited_s() -> float:
    """Seconds that this thread was ready to run and did not."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def run_model(name: str, model: Model, profile: Path | None, *, is_quick: bool, seconds: float) -> list[Case]:
    """Profiles, plans, trains."""
    source = str(ROOT / model.source)
    with tempfile.TemporaryDirectory() as folder:
        path = profile or Path(folder) / "profile.jsonl"
        if profile is None:
            batch = int(model.options["batch"])
            sizes = sorted({batch // (pins.num_microbatches or 1) for pins in model.plans.values()}, reverse=True)
            profile_file(source, model.options, ProfileRequest("cpu", tuple(sizes), PROCESSES, is_quick), path)
        plans = {plan: _plan(source, model, pins, path) for plan, pins in model.plans.items()}
    arguments = {"plans": {plan: dump_plan(found) for plan, found in plans.items()}, "seconds": seconds}
    ranks = launch_local(Job("cpu_truth:worker", arguments, PROCESSES))
    return [_case(name, plan, found, [rank[plan] for rank in ranks]) for plan, found in plans.items()]


def _plan(source: str, model: Model, pins: Pins, profile: Path) -> Plan:
    request = PlanRequest(
        num_gpus=PROCESSES, gpu="cpu", pins=pins, profile=str(profile), use_all=True, with_baselines=False
    )
    captured = capture_graph(source, model.options, None)
    return make_plan(source, model.options, request, captured=captured).plan


def _case(model: str, name: str, plan: Plan, ranks: Sequence[Mapping[str, Any]]) -> Case:
    steps = sorted(ranks[0]["steps"], key=lambda step: step[1])
    calm = steps[: max(LEAST, (len(steps) + 1) // 2, sum(share <= CALM for _, share in steps))]
    per_stage = plan.decisions.mesh.num_devices
    return Case(
        model,
        name,
        plan.predicted.step_time_s.value,
        statistics.median(step[0] for step in calm),
        tuple(peak.value for peak in plan.predicted.peak_memory_bytes for _ in range(per_stage)),
        tuple(rank["live"] for rank in ranks),
        tuple(rank["resident"] for rank in ranks),
        statistics.median(step[1] for step in calm),
        len(calm),
    )


def kendall_tau(cases: Sequence[Case]) -> float:
    """Share of pairs of plans in the right order less that in the wrong one."""
    signs = [
        1 if (a.predicted_s - b.predicted_s) * (a.measured_s - b.measured_s) > 0 else -1
        for i, a in enumerate(cases)
        for b in cases[:i]
    ]
    return sum(signs) / len(signs)


def summary(cases: Sequence[Case]) -> dict[str, Any]:
    """Figures over all cases."""
    by_model: dict[str, list[Case]] = {}
    for case in cases:
        by_model.setdefault(case.model, []).append(case)
    memory = [error for case in cases for error in case.memory_errors]
    return {
        "plans": len(cases),
        "median_time_error": statistics.median(abs(case.time_error) for case in cases),
        "kendall_tau": {name: kendall_tau(found) for name, found in by_model.items()},
        "memory_error_low": min(memory),
        "memory_error_high": max(memory),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--quick", action="store_true", help="three plans of a small model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", type=Path, help="rows to use; default: measure now")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to wait for calm steps of each model")
    arguments = parser.parse_args()
    chosen = {name: MODELS[name] for name in arguments.models or MODELS}
    if arguments.quick:
        chosen = {"mlp": QUICK_MODEL}
    cases: list[Case] = []
    for name, model in chosen.items():
        seconds = QUICK_S if arguments.quick else arguments.seconds
        for case in run_model(name, model, arguments.profile, is_quick=arguments.quick, seconds=seconds):
            cases.append(case)
            if not arguments.json:
                print(case, flush=True)
    found = summary(cases)
    if arguments.json:
        print(json.dumps({"cases": [asdict(case) for case in cases], "summary": found}, indent=1))
        return 0
    taus = ", ".join(f"{name} {tau:.2f}" for name, tau in found["kendall_tau"].items())
    print(
        f"{found['plans']} plans: memory {found['memory_error_low']:+.1%} to {found['memory_error_high']:+.1%}, "
        f"Kendall tau {taus}, median time error {found['median_time_error']:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
