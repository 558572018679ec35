"""Sweep over numbers of GPUs: the best plan on exactly N of them, for each N, and where more stop paying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.errors import InfeasibleError, InputError
from autopar.ir.plan import Plan
from autopar.planner.plan import capture_graph, make_plan
from autopar.planner.request import PlanRequest, Progress


@dataclass(frozen=True)
class SweepPoint:
    """The best plan on exactly `num_gpus`, or None and why there is none."""

    num_gpus: int
    plan: Plan | None
    reason: str = ""


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
