"""Clocks of measured pipelines: energy over the proven bound, time, and the same frontier by lowtime.

    python benchmarks/lowtime.py FILE... [--quick] [--json] [--generated] [--lowtime-python PYTHON]

A file holds one `instance`: `ops` ([id, stage, kind, microbatch]), `edges`, `options` per "stage/kind" ([MHz, s, J]),
`p2p_power_W`, `num_stages`, and, where known, `deadlines` and the frontier that lowtime found. PYTHON is an interpreter
that can import lowtime (default: this one); where it cannot, the recorded frontier of the file serves, and says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.search.clocks import (
    Arc,
    ClockOption,
    ClockPlan,
    ClockPlanner,
    ClockProblem,
    Instruction,
    pipeline_graph,
)

FACTORS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.25)
FRONTIER_POINTS, FRONTIER_REACH = 100, 1.25
MOST_COMPARED = 100
GENERATED = ((4, 8), (4, 32), (8, 16), (8, 64), (16, 32), (16, 64))
GENERATED_QUICK = ((4, 8), (8, 32), (16, 64))

LOWTIME = """
import json, sys, time
import networkx as nx
from lowtime.operation import CandidateExecutionOptions, ExecutionOption, Operation, OperationSpec
from lowtime.cost_model import ExponentialModel
from lowtime.solver import PhillipsDessouky
data = json.load(sys.stdin)
began = time.process_time()
specs = {}
for key, rows in data["options"].items():
    options = CandidateExecutionOptions([
        ExecutionOption(real_time=t, unit_time=data["unit_s"], cost=e - data["blocked_w"] * t, knob=f)
        for f, t, e in rows
    ])
    specs[key] = OperationSpec(options=options, cost_model=ExponentialModel(options))
fitted = time.process_time()
graph = nx.DiGraph()
operations = [Operation(spec=specs[key]) for key in data["ops"]]
for index, operation in enumerate(operations, start=1):
    graph.add_node(index, op=operation)
graph.add_edges_from((a + 1, b + 1) for a, b in data["arcs"])
first, last = 0, len(operations) + 1
from lowtime.operation import DummyOperation
graph.add_node(first, op=DummyOperation())
graph.add_node(last, op=DummyOperation())
for v in range(1, last):
    if not any(p != first for p in graph.predecessors(v)):
        graph.add_edge(first, v)
    if not any(s != last for s in graph.successors(v)):
        graph.add_edge(v, last)
graph.graph["source_node"], graph.graph["sink_node"] = first, last
plans = [[o.assigned_knob for o in operations] for _ in PhillipsDessouky(graph).run()]
print(json.dumps({"fit_s": fitted - began, "solve_s": time.process_time() - fitted, "plans": plans}))
"""
"""Runs beside us in a process of its own: every plan of the frontier, as one clock per instruction."""


@dataclass(frozen=True)
class Case:
    """A pipeline, its known deadlines and lowtime's known frontier, pairs of seconds and joules."""

    name: str
    problem: ClockProblem
    deadlines: tuple[dict[str, Any], ...] = ()
    recorded: tuple[tuple[float, float], ...] = ()
    recorded_s: float = 0.0
    unit_s: float = 1e-3


def read_case(path: Path) -> Case:
    """The pipeline of a file."""
    instance = json.loads(path.read_text())["instance"]
    index = {row[0]: position for position, row in enumerate(instance["ops"])}
    options = {}
    for key, rows in instance["options"].items():
        stage, kind = key.split("/")
        options[int(stage), kind] = tuple(ClockOption(*row[:3]) for row in rows)
    problem = ClockProblem(
        tuple(Instruction(stage, kind, m) for _, stage, kind, m in instance["ops"]),
        tuple(Arc(index[a], index[b]) for a, b in instance["edges"]),
        options,
        instance["p2p_power_W"],
        (1,) * instance["num_stages"],
    )
    known = instance.get("lowtime", {})
    recorded = tuple((row[2], row[3]) for row in known.get("frontier", ()))
    recorded_s = known.get("fit_s", 0.0) + known.get("solve_s", 0.0)
    unit_s = instance.get("lowtime_unit_time_s", 1e-3)
    return Case(path.stem, problem, tuple(instance.get("deadlines", ())), recorded, recorded_s, unit_s)


def generated_case(num_stages: int, num_microbatches: int) -> Case:
    """An uneven pipeline on a made-up GPU: t = a + b/f and P = p + k f V(f)^2 above a ridge, 38 clocks."""
    instructions, arcs = pipeline_graph(num_stages, num_microbatches)
    options = {}
    for stage, (kind, length_s) in itertools.product(range(num_stages), (("F", 0.05), ("B", 0.093))):
        scale = 1 + 0.15 * ((stage * 7) % 5 - 2) / 2
        rows = []
        for clock_mhz in range(1410, 854, -15):
            f = clock_mhz / 1410
            volts = 1 + 0.85 * max(0.0, f - 0.773)
            time_s = scale * length_s * (0.12 + 0.88 / f)
            rows.append(ClockOption(clock_mhz, time_s, time_s * (40 + 310 * f * volts**2)))
        options[stage, kind] = tuple(rows)
    problem = ClockProblem(instructions, arcs, options, 83.64, (1,) * num_stages)
    return Case(f"generated-{num_stages}x{num_microbatches}", problem)


def measure_plans(case: Case, planner: ClockPlanner) -> list[dict[str, Any]]:
    """One row per deadline."""
    known = case.deadlines or tuple({"deadline_s": planner.fastest_s * f, "deadline_factor": f} for f in FACTORS)
    rows = []
    for entry in known:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        plan = planner.plan(entry["deadline_s"])
        rows.append(
            {
                "case": case.name,
                "deadline_s": entry["deadline_s"],
                "factor": entry["deadline_s"] / planner.fastest_s,
                "bound_j": plan.bound_j,
                "reference_bound_j": entry.get("lp_lower_bound_J"),
                "energy_j": plan.energy_j,
                "makespan_s": plan.makespan_s,
                "cpu_s": time.process_time() - cpu_s,
                "wall_s": time.perf_counter() - wall_s,
                "over_bound": plan.energy_j / plan.bound_j - 1,
            }
        )
    return rows


def measure_frontier(case: Case, planner: ClockPlanner) -> dict[str, Any]:
    """One hundred deadlines in one run."""
    step = (FRONTIER_REACH - 1) / (FRONTIER_POINTS - 1)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    plans = planner.frontier([planner.fastest_s * (1 + step * n) for n in range(FRONTIER_POINTS)])
    return {
        "case": case.name,
        "points": len(plans),
        "cpu_s": time.process_time() - cpu_s,
        "wall_s": time.perf_counter() - wall_s,
        "worst_over_bound": max(p.energy_j / p.bound_j - 1 for p in plans),
    }


def lowtime_frontier(case: Case, python: str) -> tuple[str, float, list[tuple[float, float]]]:
    """Source label, CPU seconds, and (seconds, joules) of lowtime's plans on the real options."""
    if subprocess.run([python, "-c", "import lowtime.solver"], capture_output=True, check=False).returncode:
        return "recorded", case.recorded_s, list(case.recorded)
    problem = case.problem
    data = {
        "unit_s": case.unit_s,
        "blocked_w": problem.blocked_w_per_gpu,
        "options": {
            f"{stage}/{kind}": [(o.clock_mhz, o.time_s, o.energy_j) for o in options]
            for (stage, kind), options in problem.options.items()
        },
        "ops": [f"{i.stage}/{i.kind}" for i in problem.instructions],
        "arcs": [(arc.before, arc.after) for arc in problem.arcs],
    }
    command = [python, "-c", LOWTIME]
    # Away from this directory, whose lowtime.py would be imported in place of the package.
    done = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, check=True, cwd="/")
    answer = json.loads(done.stdout.splitlines()[-1])
    points = [price(problem, plan) for plan in answer["plans"]]
    return "live", answer["fit_s"] + answer["solve_s"], points


def price(problem: ClockProblem, clocks_mhz: list[float]) -> tuple[float, float]:
    """Seconds and joules of given clocks: the pipeline with one option per instruction."""
    instructions = tuple(Instruction(i.stage, f"{n}", i.microbatch) for n, i in enumerate(problem.instructions))
    table = {key: {o.clock_mhz: o for o in options} for key, options in problem.options.items()}
    chosen = [table[i.stage, i.kind][c] for i, c in zip(problem.instructions, clocks_mhz, strict=True)]
    finish: list[float] = [0.0] * len(chosen)
    before: list[list[int]] = [[] for _ in chosen]
    for arc in problem.arcs:
        before[arc.after].append(arc.before)
    done: set[int] = set()
    waiting = list(range(len(instructions)))
    while waiting:
        ready = [v for v in waiting if done.issuperset(before[v])]
        for v in ready:
            finish[v] = max((finish[u] for u in before[v]), default=0.0) + chosen[v].time_s
        done.update(ready)
        waiting = [v for v in waiting if v not in done]
    step_s = max(finish)
    idle_s = sum(problem.gpus_per_stage) * step_s - sum(o.time_s for o in chosen)
    return step_s, sum(o.energy_j for o in chosen) + problem.blocked_w_per_gpu * idle_s


def compare(case: Case, planner: ClockPlanner, python: str, most: int) -> dict[str, Any] | None:
    """Our energy over lowtime's at lowtime's own times, at up to `most` points of its frontier."""
    source, cpu_s, points = lowtime_frontier(case, python)
    if not points:
        return None
    best: list[tuple[float, float]] = []
    for step_s, joules in sorted(points):
        if not best or joules < best[-1][1]:
            best.append((step_s, joules))
    stride = max(1, -(-len(best) // most))
    sample = best[::stride]
    plans: tuple[ClockPlan, ...] = planner.frontier([step_s for step_s, _ in sample])
    ratios = [plan.energy_j / joules - 1 for plan, (_, joules) in zip(plans, sample, strict=True)]
    return {
        "case": case.name,
        "source": source,
        "lowtime_cpu_s": cpu_s,
        "lowtime_points": len(points),
        "compared": len(sample),
        "dearer": sum(ratio > 0 for ratio in ratios),
        "mean_ratio": sum(ratios) / len(ratios),
        "worst_ratio": max(ratios),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Clocks of pipelines: energy over the bound, and against lowtime.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument(
        "--quick", action="store_true", help="fewer generated pipelines and compared points; under 50 s"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--generated", action="store_true", help="also pipelines of up to 16 stages x 64 microbatches")
    parser.add_argument("--lowtime-python", default=sys.executable, metavar="PYTHON")
    options = parser.parse_args()
    if not options.files and not options.generated:
        parser.error("give files, or --generated")
    result: dict[str, list[dict[str, Any]]] = {"plans": [], "frontiers": [], "lowtime": []}
    cases = [read_case(path) for path in options.files]
    for case in cases:
        planner = ClockPlanner(case.problem)
        result["plans"] += measure_plans(case, planner)
        result["frontiers"].append(measure_frontier(case, planner))
        compared = compare(case, planner, options.lowtime_python, 20 if options.quick else MOST_COMPARED)
        result["lowtime"] += [] if compared is None else [compared]
    if options.generated:
        for stages, microbatches in GENERATED_QUICK if options.quick else GENERATED:
            made = generated_case(stages, microbatches)
            chosen = ClockPlanner(made.problem)
            at = tuple({"deadline_s": chosen.fastest_s * f} for f in (1.0, 1.02, 1.1))
            result["plans"] += measure_plans(Case(made.name, made.problem, at), chosen)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_rows(result)


def print_rows(result: dict[str, list[dict[str, Any]]]) -> None:
    """One line per figure."""
    for row in result["plans"]:
        known = row["reference_bound_j"]
        against = "" if known is None else f" ({row['bound_j'] / known - 1:+.0e} of reference)"
        text = f"{row['case']:<36} x{row['factor']:.3f} {row['deadline_s']:.6f} s bound {row['bound_j']:.2f} J{against}"
        used = f"cpu {row['cpu_s']:.3f} s wall {row['wall_s']:.3f} s"
        print(f"{text} plan {row['energy_j']:.2f} J {used} over bound {row['over_bound']:.4%}")
    for row in result["frontiers"]:
        used = f"cpu {row['cpu_s']:.2f} s wall {row['wall_s']:.2f} s"
        print(f"{row['case']:<36} frontier of {row['points']} {used} worst over bound {row['worst_over_bound']:.4%}")
    for row in result["lowtime"]:
        text = (
            f"{row['case']:<36} lowtime ({row['source']}) {row['lowtime_points']} plans in {row['lowtime_cpu_s']:.1f} s"
        )
        counts = f"dearer at {row['dearer']} of {row['compared']} of its times, worst {row['worst_ratio']:+.3%}"
        print(f"{text}: we are {counts}, mean {row['mean_ratio']:+.3%}")


if __name__ == "__main__":
    main()
