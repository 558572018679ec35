"""Predicted against measured energy of training: pipelines under clocks and power limits, and single GPUs.

    python benchmarks/energy.py FILE_OR_DIRECTORY... [--quick] [--json] [--fit]

CSV files are known by their columns: iterations of pipelines, times (and energies) of their stages, planned frontiers,
dimensions of the models, and epochs of single GPUs under power limits. Five kinds of lines:

- `given`: joules of an iteration from the measured times of its stages under its clock or limits. A stage draws what
  `cost.power.stage_w` says; the pipeline is that of `search.clocks`. Plans with a clock per instruction are not
  published: ours at the same slowdown stands for them, and stages at other clocks take t = a + b/f.
- `built-in`: the same from the device file alone; the model is captured and priced as `autopar estimate` does.
- `saving`: energy that clocks per instruction save against all GPUs at the highest clock, in no more time than that
  takes, on measured stage profiles; beside the published saving;
- `frontier`: energy of our plan over the published one at equal time.
- `single`: time and power over those under the highest limit, from the power there (`cost.power.program_under_limit`).

Beside each prediction of joules stands board limit x time, with the measured time. Exit code 3: no row could be read.
With `--fit`: the few numbers of a device file that fit seconds and joules of its `built-in` rows under one limit best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from energy_builtin import FITTED, BuiltIn, fit_numbers, price_pipeline
from energy_rows import Tables, read_tables

from autopar.cost.device import DeviceSpec
from autopar.cost.hardware import Cluster, list_gpus, with_power_limit
from autopar.cost.power import program_under_limit, stage_w
from autopar.errors import AutoparError
from autopar.planner.clocks import highest_energy_j
from autopar.search.clocks import ClockOption, ClockPlanner, ClockProblem, pipeline_graph

COMPUTE_SHARE = 0.87
"""Share of a stage's time that goes as one over the clock, where its times at two clocks are not known."""
ROUNDING = 1 + 1e-9
FRONTIER_POINTS, FRONTIER_POINTS_QUICK = 12, 3
CLOCKED_QUICK = 2


@dataclass(frozen=True)
class Line:
    """One case: `measured` and `predicted` in `unit`; `naive` is board limit x time."""

    kind: str
    name: str
    group: str
    measured: float
    predicted: float
    unit: str
    naive: float | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def text(self) -> str:
        naive = "" if self.naive is None else f"  limit x time {self.naive / self.measured - 1:+7.1%}"
        figures = f"{self.measured:12.5g} {self.unit:2} {self.predicted:12.5g} {self.unit:2}"
        return f"{self.kind:9} {self.name:70} {figures}{naive}  {self.error:+7.1%}"


@dataclass(frozen=True)
class Run:
    """One iteration that was measured.

    Attributes:
        limits_w: power limit of each stage; empty: clocks per instruction.
    """

    name: str
    cluster: Cluster
    model: str
    partition: str
    stages: int
    width: int
    mbs: int
    microbatches: int
    method: str
    limits_w: tuple[float, ...]
    time_s: float
    energy_j: float

    @property
    def naive_j(self) -> float:
        return self.cluster.spec.limit_w * self.stages * self.width * self.time_s

    def line(self, kind: str, predicted_j: float) -> Line:
        return Line(kind, self.name, self.method, self.energy_j, predicted_j, "J", self.naive_j)


def runs(tables: Tables) -> list[Run]:
    """Measured iterations on known GPUs, without warm-up passes."""
    found = []
    for row in tables.iterations:
        cluster = tables.cluster(row["gpu"], int(row["n_gpus"]))
        if cluster is None or not row["kind"].startswith("measured") or "warm-up" in row["kind"]:
            continue
        stages, limit = int(row["pp"]), cluster.spec.limit_w
        policy = row["policy"]
        name = f"{row['row_id']} {row['model']} {row['method']}: {policy}"[:70]
        watts = [float(word) for word in policy.replace(",", " ").split() if word.replace(".", "", 1).isdigit()]
        is_clocked = row["knob"] == "frequency" and row["method"] != "max power"
        limits = () if is_clocked else (limit,) * stages if row["knob"] == "frequency" else tuple(watts)
        limits = limits * stages if len(limits) == 1 else limits
        if not is_clocked and len(limits) != stages:
            continue
        found.append(
            Run(
                name, cluster, row["model"], row["partition"], stages, int(row["dp"]) * int(row["tp"]),
                int(row["mbs"] or 0), int(row["n_microbatches"]), row["method"], limits,
                float(row["iteration_time_s"]), float(row["energy_j"]),
            )
        )  # fmt: skip
    return found


def pipeline(run: Run, options: Mapping[tuple[int, str], tuple[ClockOption, ...]], transfer_s: float) -> ClockPlanner:
    instructions, arcs = pipeline_graph(run.stages, run.microbatches, transfer_s=transfer_s)
    blocked_w = run.cluster.spec.blocked_w
    return ClockPlanner(ClockProblem(instructions, arcs, options, blocked_w, (run.width,) * run.stages))


def limited(spec: DeviceSpec, limit_w: float) -> DeviceSpec:
    return with_power_limit(Cluster(spec, 1, 1, 1), limit_w).spec


def slowdowns(found: Sequence[Run]) -> dict[str, float]:
    """Time of every run with clocks per instruction over that of its pipeline at maximum power."""
    fastest = defaultdict(list)
    for run in found:
        if run.method == "max power":
            fastest[run.model, run.partition].append(run.time_s)
    return {
        run.name: max(1.0, run.time_s / statistics.fmean(fastest[run.model, run.partition]))
        for run in found
        if not run.limits_w and (run.model, run.partition) in fastest
    }


def given_lines(tables: Tables, found: Sequence[Run]) -> Iterator[Line]:
    """Joules from stage times."""
    slower = slowdowns(found)
    for members in clocked(found, slower).values():
        if options := clock_options(tables, members[0]):
            joules = clocked_j(pipeline(members[0], options, 0.0), [slower[run.name] for run in members])
            for run, energy_j in zip(members, joules, strict=True):
                yield run.line("given", energy_j)
    for run in found:
        if run.limits_w and (options := limit_options(tables, run)):
            planner = pipeline(run, options, 0.0)
            yield run.line("given", highest_energy_j(planner.problem, planner.fastest_s))


def clocked(found: Sequence[Run], slower: Mapping[str, float]) -> dict[tuple[str, str], list[Run]]:
    """Runs with clocks per instruction, by model and partition."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in found:
        if not run.limits_w and run.name in slower:
            groups[run.model, run.partition].append(run)
    return groups


def clocked_j(planner: ClockPlanner, slower: Sequence[float]) -> list[float]:
    """Joules of plans that are so many times as slow as the fastest; all at once, which takes a fifth of the time."""
    deadlines_s = [planner.fastest_s * factor * ROUNDING for factor in slower]
    joules = {plan.deadline_s: plan.energy_j for plan in planner.frontier(deadlines_s)}
    return [joules[deadline_s] for deadline_s in deadlines_s]


def limit_options(tables: Tables, run: Run) -> dict[tuple[int, str], tuple[ClockOption, ...]]:
    """The one option of every stage under its limit; empty where its time was not measured."""
    spec, found = run.cluster.spec, {}
    for stage, kind in itertools.product(range(run.stages), "FB"):
        limit_w = run.limits_w[stage]
        time_s = tables.limited_s(run.model, run.partition, stage, kind, limit_w)
        if time_s is None and limit_w == spec.limit_w:
            time_s = tables.fastest_s(run.model, run.partition, stage, kind)
        if time_s is None:
            return {}
        power_w = stage_w(limited(spec, limit_w))
        found[stage, kind] = (ClockOption(spec.clock_max_hz / 1e6, time_s, power_w * time_s),)
    return found


def clock_options(tables: Tables, run: Run) -> dict[tuple[int, str], tuple[ClockOption, ...]]:
    """All clocks of every stage: from its time at the highest, t = a + b/f."""
    spec, found = run.cluster.spec, {}
    specs = (spec, *run.cluster.slower_specs())
    share = compute_share(tables, run)
    for stage, kind in itertools.product(range(run.stages), "FB"):
        time_s = tables.fastest_s(run.model, run.partition, stage, kind)
        if time_s is None:
            return {}
        times = [time_s * (share / at.speed + 1 - share) for at in specs]
        found[stage, kind] = tuple(
            ClockOption(at.clock_share * spec.clock_max_hz / 1e6, t, stage_w(at) * t)
            for at, t in zip(specs, times, strict=True)
        )
    return found


def compute_share(tables: Tables, run: Run) -> float:
    """b/f over a + b/f, from stages that were measured at two clocks."""
    spec, shares = run.cluster.spec, []
    for (stage, kind), times in tables.clocked_s(run.model, run.partition).items():
        fastest_s = tables.fastest_s(run.model, run.partition, stage, kind)
        for clock_mhz, time_s in times.items():
            at = replace(spec, clock_share=clock_mhz * 1e6 / spec.clock_max_hz)
            if fastest_s is not None and at.speed < 1:
                shares.append((time_s / fastest_s - 1) / (1 / at.speed - 1))
    return min(1.0, statistics.fmean(shares)) if shares else COMPUTE_SHARE


def built_in_lines(tables: Tables, found: Sequence[Run], quick: bool) -> Iterator[Line]:
    """Joules from the device file."""
    priced: dict[tuple[str, str], BuiltIn | None] = {}
    slower = slowdowns(found)
    for run in found:
        key = run.model, run.cluster.gpu
        if key not in priced:
            if quick and len(priced) == 1:
                continue
            priced[key] = price(tables, run)
        built = priced[key]
        if built is None:
            continue
        if run.limits_w and len(set(run.limits_w)) == 1:
            yield run.line("built-in", built.uniform_j(run.limits_w[0]))
        elif run.limits_w:
            planner = pipeline(run, built.limited(run.limits_w), built.transfer_s)
            energy_j = highest_energy_j(planner.problem, planner.fastest_s)
            yield run.line("built-in", energy_j + built.step_j)
    for members in clocked(found, slower).values():
        built = priced.get((members[0].model, members[0].cluster.gpu))
        if built is not None:
            planner = pipeline(members[0], built.clocked, built.transfer_s)
            joules = clocked_j(planner, [slower[run.name] for run in members])
            for run, energy_j in zip(members, joules, strict=True):
                yield run.line("built-in", energy_j + built.step_j)


def price(tables: Tables, run: Run) -> BuiltIn | None:
    model = tables.model(run.model, run.mbs * run.microbatches)
    if model is None:
        return None
    try:
        return price_pipeline(model, run.cluster, stages=run.stages, width=run.width, microbatches=run.microbatches)
    except AutoparError as error:
        print(f"# {run.name}: not priced: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def frontier_lines(tables: Tables, quick: bool) -> Iterator[Line]:
    """Savings at zero slowdown, and energy over that of published plans at equal time."""
    for key, points in tables.frontiers().items():
        gpu, model, microbatches, width = key
        cluster, options = tables.cluster(gpu, 1), tables.profile(model)
        if cluster is None or not options:
            continue
        stages = 1 + max(stage for stage, _ in options)
        instructions, arcs = pipeline_graph(stages, microbatches)
        problem = ClockProblem(instructions, arcs, options, cluster.spec.blocked_w, (width,) * stages)
        highest = {at: (max(rows, key=lambda option: option.clock_mhz),) for at, rows in options.items()}
        plain = ClockPlanner(replace(problem, options=highest))
        planner = ClockPlanner(problem)
        whole_j = plain.plan(plain.fastest_s * ROUNDING).energy_j
        ours_j = planner.plan(plain.fastest_s).energy_j
        name = f"{model} {gpu}, {microbatches} microbatches"
        published = tables.published_saving(model, microbatches)
        if published is not None:
            yield Line("saving", name, "zero slowdown", 100 * published, 100 * (1 - ours_j / whole_j), "%")
        count = FRONTIER_POINTS_QUICK if quick else FRONTIER_POINTS
        for time_s, energy_j in points[:: max(1, len(points) // count)][:count]:
            if time_s >= planner.fastest_s:
                found_j = planner.plan(time_s * ROUNDING).energy_j
                yield Line("frontier", f"{name} in {time_s:.2f} s", "equal time", energy_j, found_j, "J")


def single_lines(tables: Tables) -> Iterator[Line]:
    """Ratios to the highest limit."""
    for (hardware, *words), rows in tables.programs().items():
        top = max(rows)
        spec = board(hardware, top)
        if spec is None:
            continue
        base_s, base_w = rows[top]
        for limit_w in sorted(rows, reverse=True)[1:]:
            time_s, power_w = rows[limit_w]
            more, found_w = program_under_limit(replace(spec, power_limit_w=limit_w), base_w)
            name = f"{hardware} {' '.join(words)} {limit_w:g} W over {top:g} W"
            yield Line("single", f"{name}: time", f"{hardware} time", time_s / base_s, more, "1")
            yield Line("single", f"{name}: power", f"{hardware} power", power_w / base_w, found_w / base_w, "1")


def board(hardware: str, top_w: float) -> DeviceSpec | None:
    """The device of this name whose limit is nearest."""
    plain = hardware.lower().replace(" ", "").replace("-", "")
    named = [spec for spec in list_gpus() if plain in spec.name.replace("-", "")]
    return min(named, key=lambda spec: abs(spec.limit_w - top_w), default=None)


def summary(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Errors by kind and group."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.kind, "all"].append(line)
        groups[line.kind, line.group].append(line)
    for (kind, group), members in sorted(groups.items()):
        errors = sorted(abs(line.error) for line in members)
        naive = [line for line in members if line.naive is not None]
        worse = [line for line in naive if abs(line.error) > abs((line.naive or 0.0) / line.measured - 1)]
        yield {
            "kind": kind, "group": group, "rows": len(members), "bias": statistics.median(m.error for m in members),
            "median": statistics.median(errors), "p90": errors[int(0.9 * (len(errors) - 1))], "worst": errors[-1],
            "farther_than_limit_x_time": len(worse) if naive else None,
        }  # fmt: skip


def thinned(found: Sequence[Run]) -> list[Run]:
    """Two runs of every model and method."""
    kept: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in found:
        kept[run.model, run.method].append(run)
    return [run for members in kept.values() for run in members[:: max(1, len(members) // 2)][:CLOCKED_QUICK]]


def all_lines(tables: Tables, quick: bool) -> Iterable[Line]:
    found = runs(tables)
    chosen = thinned(found) if quick else found
    yield from given_lines(tables, chosen)
    yield from built_in_lines(tables, chosen, quick)
    yield from frontier_lines(tables, quick)
    yield from single_lines(tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few rows of every model and method")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fit", action="store_true", help=f"of the device file: {', '.join(FITTED)}")
    arguments = parser.parse_args()
    began, wall = time.process_time(), time.perf_counter()
    tables = read_tables(arguments.files)
    if arguments.fit:
        return fit(tables)
    lines = []
    for line in all_lines(tables, arguments.quick):
        lines.append(line)
        if not arguments.json:
            print(line.text, flush=True)
    rows = list(summary(lines))
    used = {"cpu_s": time.process_time() - began, "wall_s": time.perf_counter() - wall}
    if arguments.json:
        print(json.dumps({"lines": [asdict(line) for line in lines], "summary": rows, **used}))
        return 0 if lines else 3
    for row in rows:
        worse = row["farther_than_limit_x_time"]
        naive = "" if worse is None else f", farther than limit x time: {worse}"
        print(
            f"{row['kind']} {row['group']}: {row['rows']} rows{naive}, bias {row['bias']:+.1%}, p90 {row['p90']:.1%}, "
            f"worst {row['worst']:.1%}, median {row['median']:.1%}"
        )
    print(f"CPU {used['cpu_s']:.1f} s, wall {used['wall_s']:.1f} s")
    return 0 if lines else 3


def fit(tables: Tables) -> int:
    """Prints numbers of device files that fit best; writes nothing."""
    uniform = [run for run in runs(tables) if run.limits_w and len(set(run.limits_w)) == 1]
    for gpu in sorted({run.cluster.gpu for run in uniform}):
        cases = [(price(tables, run), run) for run in one_each(run for run in uniform if run.cluster.gpu == gpu)]
        rows = [(built, run.limits_w[0], run.time_s, run.energy_j) for built, run in cases if built is not None]
        before, after, numbers = fit_numbers(rows)
        found = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        print(f"{gpu}: {len(rows)} rows, mean log error {before:.3f} -> {after:.3f}: {found}")
    return 0


def one_each(found: Iterable[Run]) -> list[Run]:
    """One run of every model and limit."""
    return list({(run.model, run.limits_w): run for run in found}.values())


if __name__ == "__main__":
    raise SystemExit(main())
