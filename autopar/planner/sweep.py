"""Sweep over numbers of GPUs: the best plan on exactly N of them, for each N, and where more stop paying.

Figures are predicted. `measure_sweep` also runs the plans of few GPUs on this machine: on its GPUs if they were planned
for, else as gloo processes on its processor, for which device `cpu` stands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from autopar.errors import InfeasibleError, InputError, WorkerError
from autopar.ir.measured import MeasuredStep, power_of
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.planner.detect import detect_gpus, kebab_name
from autopar.planner.execute import RunReport, run_plan
from autopar.planner.plan import capture_graph, make_plan
from autopar.planner.request import PlanRequest, Progress, say_nothing
from autopar.units import format_seconds

CPU = "cpu"
BUSY = 0.75
"""Load per core, before runs begin, from which they are disturbed."""


@dataclass(frozen=True)
class SweepPoint:
    """The best plan on exactly `num_gpus`, or None and why there is none.

    Attributes:
        measured: its steps, run here; None where they were not, and `not_measured` says why ("": nobody asked).
    """

    num_gpus: int
    plan: Plan | None
    reason: str = ""
    measured: MeasuredStep | None = None
    not_measured: str = ""


@dataclass(frozen=True)
class Sweep:
    """Points by rising number of GPUs.

    `base` is the first that has a plan: speed-up and efficiency are relative to it.
    """

    points: tuple[SweepPoint, ...]

    @property
    def base(self) -> SweepPoint | None:
        return next((point for point in self.points if point.plan is not None), None)

    @property
    def planned(self) -> tuple[Plan, ...]:
        return tuple(point.plan for point in self.points if point.plan is not None)

    @property
    def missing(self) -> tuple[tuple[int, str], ...]:
        """(number of GPUs, why there is no plan)."""
        return tuple((point.num_gpus, point.reason) for point in self.points if point.plan is None)

    @property
    def measured(self) -> dict[int, MeasuredStep]:
        """By number of GPUs."""
        return {point.num_gpus: point.measured for point in self.points if point.measured is not None}

    @property
    def unmeasured(self) -> tuple[tuple[int, str], ...]:
        """(number of GPUs, why its plan was not run), of those that were to be."""
        return tuple((point.num_gpus, point.not_measured) for point in self.points if point.not_measured)


@dataclass(frozen=True)
class Measuring:
    """What to run.

    Attributes:
        most: GPUs or processes; plans that use more are not run.
        steps: of each plan, of which the first does not count; >= 2.
        limit_s: plans whose steps are predicted to take longer together are not run.
    """

    most: int
    steps: int = 6
    limit_s: float = 600.0

    def __post_init__(self) -> None:
        if self.most < 1 or self.steps < 2 or self.limit_s <= 0:
            raise InputError("measuring needs at least 1 process, 2 steps and some time")


def measuring_here(gpu: str | None, most: int | None, steps: int, limit_s: float) -> tuple[str, Measuring]:
    """The device to plan for, so that plans can be run here, and what to run.

    Args:
        gpu: as the user named it, or None.
        most: None: as many as there are GPUs, or processor cores (at least 2).

    Raises:
        InputError: the GPU that the user named is not here.
    """
    found = detect_gpus()
    here = next((name for name in map(kebab_name, found) if name is not None), CPU)
    if gpu not in (None, CPU, here):
        has = here if here != CPU else f"no GPU of a known type; plan for its processor with --gpu {CPU}"
        raise InputError(f"--measure runs plans on this machine, which has no {gpu}: it has {has}")
    chosen = here if gpu is None else gpu
    count = num_cores() if chosen == CPU else len(found)
    return chosen, Measuring(max(2, count) if most is None else most, steps, limit_s)


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_note() -> str:
    """A sentence if other programs keep this machine's cores busy, so that measured times will be too long; else ""."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= BUSY * num_cores():
        return ""
    return (
        f"other programs kept this machine busy (load {load:.1f} on {num_cores()} cores): measured times are too long"
    )


def measure_sweep(found: Sweep, asked: Measuring, progress: Progress | None = None) -> Sweep:
    """The sweep with what was measured of its plans of few GPUs, one after another."""
    busy = busy_note()
    return Sweep(tuple(_measured(point, asked, progress or say_nothing, busy) for point in found.points))


def _measured(point: SweepPoint, asked: Measuring, progress: Progress, busy: str) -> SweepPoint:
    plan = point.plan
    if plan is None:
        return point
    if point.num_gpus > asked.most:
        return replace(point, not_measured=f"more than the {asked.most} that are run here")
    expected_s = asked.steps * plan.predicted.step_time_s.value
    if expected_s > asked.limit_s:
        words = f"{asked.steps} steps should take {format_seconds(expected_s)}, longer than allowed"
        return replace(point, not_measured=f"{words} ({format_seconds(asked.limit_s)})")
    progress(f"running the plan on {point.num_gpus}")
    try:
        with hidden_gpus() if plan.cluster.gpu == CPU else _nothing():
            report = run_plan(plan, settings=RunSettings(asked.steps), progress=progress)
    except (InputError, WorkerError) as error:
        return replace(point, not_measured=str(error).splitlines()[0])
    step = measured_step(plan, report)
    return replace(point, measured=replace(step, notes=(*step.notes, *([busy] if busy else []))))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def hidden_gpus() -> Iterator[None]:
    """Processes that are started meanwhile see no GPU."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def measured_step(plan: Plan, report: RunReport) -> MeasuredStep:
    """What a run says of a step."""
    time, energy = report.step_time, report.energy.total
    notes = [*report.notes, *report.energy.notes]
    if plan.cluster.gpu == CPU and report.num_processes > num_cores():
        notes.append(f"{report.num_processes} processes shared {num_cores()} cores; predictions give each its own")
    power = power_of(energy, time)
    return MeasuredStep(report.num_processes, len(report.losses) - 1, time, energy, power, tuple(notes))


def sweep_model(
    source: str,
    options: Mapping[str, str],
    request: PlanRequest,
    counts: Sequence[int],
    progress: Progress | None = None,
) -> Sweep:
    """Plan the model on exactly N GPUs for every N of `counts`, under the request's objective, pins and limits.

    Raises:
        InputError, CaptureError: the model or a number is wrong.
    """
    if request.cluster is not None:
        raise InputError("sweep varies the number of GPUs of one type: name it with --gpu, not --cluster")
    captured = capture_graph(source, options, request.batch_size, progress)
    points = []
    for count in sorted(set(counts)):
        own = replace(request, num_gpus=count, use_all=True, with_baselines=False)
        try:
            points.append(SweepPoint(count, make_plan(source, options, own, progress, captured=captured).plan))
        except InfeasibleError as error:
            points.append(SweepPoint(count, None, str(error).splitlines()[0]))
        except InputError as error:
            points.append(SweepPoint(count, None, str(error)))
    return Sweep(tuple(points))
