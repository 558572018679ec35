"""Fit a few numbers of one device file to measured training steps.

    python benchmarks/fit_steps.py rows.csv... --gpu a100-sxm-80gb --fit gemm_efficiency,attention_efficiency [--json]

The CSVs have the schema of `autopar validate`. Each row that has a step time and whose configuration is known is
planned once, and its plan priced again and again with other numbers, by the `predict` that prints a plan's figures.
What is minimised is the mean of |log(predicted / measured)|, which outliers pull on little, by a golden-section search
along one number after the other. Bounds keep every number physical. Nothing is written: put the result into the file
of the device with this command as its source.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.cost.hardware import Cluster
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import AutoparError
from autopar.ir.solution import KEPT, Decisions
from autopar.planner.configuration import Configuration, configure
from autopar.planner.estimate import price_configuration
from autopar.planner.plan import CapturedGraph, capture_graph
from autopar.planner.published import read_tables
from autopar.planner.request import choose_target

BOUNDS: Mapping[str, tuple[float, float]] = {
    "gemm_efficiency": (0.3, 0.98),
    "attention_efficiency": (0.1, 0.95),
    "attention_backward_efficiency": (0.1, 0.95),
    "gemm_depth": (16, 1024),
    "memory_efficiency": (0.3, 0.98),
    "launch_overhead_s": (1e-6, 2e-5),
    "dispatch_s": (1e-6, 3e-5),
    "overlap_slowdown": (0.01, 1.0),
}
GOLDEN = (math.sqrt(5) - 1) / 2
STEPS = 9
"""Of a golden-section search: narrows a range to 1.3 %."""


@dataclass(frozen=True)
class Case:
    """A row with its plan."""

    name: str
    source: str
    measured_s: float
    tables: CostTables
    decisions: Decisions

    def predicted_s(self, numbers: Mapping[str, float]) -> float:
        cluster = self.tables.cluster
        spec = replace(cluster.spec, **numbers)
        tables = self.tables.on(replace(cluster, spec=spec))
        return predict(tables, self.decisions).step_time_s.value


def make_cases(paths: Sequence[str], gpu: str, every: int) -> list[Case]:
    """Plans of every `every`-th row measured on `gpu`."""
    graphs: dict[object, CapturedGraph] = {}
    cases = []
    tables, _ = read_tables(paths)
    rows = [(entry.source, entry.row) for entry in tables if entry.row is not None and entry.row.quality in "AB"]
    for source, row in [(source, row) for source, row in rows if row.step_s][::every]:
        try:
            found = configure(row)
            if found.request.gpu != gpu:
                continue
            if found.capture_key not in graphs:
                graphs[found.capture_key] = capture_graph(found.source, found.options, found.request.batch_size)
            cases.append(_case(row.row_id, source, row.step_s or 0.0, found, graphs[found.capture_key]))
        except AutoparError as error:
            print(f"# {row.row_id} left out: {str(error).splitlines()[0]}")
    return cases


def _case(name: str, source: str, measured_s: float, found: Configuration, captured: CapturedGraph) -> Case:
    planned = price_configuration(found.source, found.options, found.request, captured=captured).planned
    cluster = choose_target(found.request).cluster
    assert isinstance(cluster, Cluster)
    pinned = found.request.pins.recompute
    tables = CostTables(
        captured.graph, cluster, pins=found.request.pins, software=found.request.software,
        keep=pinned if pinned in KEPT else "none",
    )  # fmt: skip
    return Case(name, source, measured_s, tables, planned.plan.decisions)


def error_of(cases: Sequence[Case], numbers: Mapping[str, float]) -> float:
    """Mean |log(predicted / measured)|."""
    return statistics.fmean(abs(math.log(case.predicted_s(numbers) / case.measured_s)) for case in cases)


def golden(function: Callable[[float], float], low: float, high: float) -> float:
    """Least point of a function with one valley, on a logarithmic scale."""
    a, b = math.log(low), math.log(high)
    left, right = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
    at_left, at_right = function(math.exp(left)), function(math.exp(right))
    for _ in range(STEPS):
        if at_left < at_right:
            b, right, at_right = right, left, at_left
            left = b - GOLDEN * (b - a)
            at_left = function(math.exp(left))
        else:
            a, left, at_left = left, right, at_right
            right = a + GOLDEN * (b - a)
            at_right = function(math.exp(right))
    return math.exp(left if at_left < at_right else right)


def fit(cases: Sequence[Case], names: Sequence[str], rounds: int) -> dict[str, float]:
    """The numbers that fit best."""
    spec = cases[0].tables.cluster.spec
    numbers = {name: float(getattr(spec, name)) for name in names}
    for _ in range(rounds):
        for name in names:

            def at(value: float, name: str = name) -> float:
                return error_of(cases, {**numbers, name: value})

            low, high = BOUNDS[name]
            found = golden(at, max(low, numbers[name] / 2.5), min(high, numbers[name] * 2.5))
            if at(found) < error_of(cases, numbers):
                numbers[name] = found
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--gpu", required=True, help="device file whose rows are fitted")
    parser.add_argument("--fit", required=True, help=f"numbers, of {', '.join(BOUNDS)}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth row")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="every fifth row, one round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.fit.split(",")
    cases = make_cases(arguments.tables, arguments.gpu, 5 if arguments.quick else arguments.every)
    if not cases:
        raise SystemExit(f"no row of these tables was measured on {arguments.gpu}")
    before = error_of(cases, {})
    numbers = fit(cases, names, 1 if arguments.quick else arguments.rounds)
    errors = sorted(abs(case.predicted_s(numbers) / case.measured_s - 1) for case in cases)
    result = {
        "gpu": arguments.gpu, "rows": len(cases), "numbers": numbers, "mean_log_error_before": before,
        "mean_log_error": error_of(cases, numbers), "median_error": statistics.median(errors),
        "p90_error": errors[int(0.9 * (len(errors) - 1))],
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return 0
    for case in cases:
        found = case.predicted_s(numbers)
        print(f"{case.name:12} {case.measured_s:9.3f} s  {found:9.3f} s  {found / case.measured_s - 1:+7.1%}")
    print(f"{arguments.gpu}: {len(cases)} rows, {', '.join(f'{k} {v:.4g}' for k, v in numbers.items())}")
    print(f"mean log error {before:.3f} -> {result['mean_log_error']:.3f}, median {result['median_error']:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
