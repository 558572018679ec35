"""Estimate: what a configuration that the user fixes would cost, and what the free plan on the same GPUs costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.errors import InputError
from autopar.ir.plan import Plan
from autopar.ir.solution import Pins
from autopar.planner.plan import Planned, capture_graph, make_plan
from autopar.planner.request import PlanRequest, Progress


@dataclass(frozen=True)
class Estimate:
    """The best plan under the user's pins, and the one without them."""

    pinned: Planned
    free: Plan


def estimate_model(
    source: str, options: Mapping[str, str], request: PlanRequest, progress: Progress | None = None
) -> Estimate:
    """Price a configuration by the same search and simulation as a plan.

    Raises:
        InputError: nothing is pinned, or the model or a number is wrong.
        InfeasibleError: no plan under the pins fits or keeps the limits.
    """
    if request.pins == Pins():
        raise InputError("estimate prices a configuration: fix it with --pin, e.g. --pin dp=4,tp=2,pp=1")
    request = replace(request, with_baselines=False)
    captured = capture_graph(source, options, request.batch_size, progress)
    pinned = make_plan(source, options, request, progress, captured=captured)
    free = make_plan(source, options, replace(request, pins=Pins()), progress, captured=captured)
    return Estimate(pinned, free.plan)
