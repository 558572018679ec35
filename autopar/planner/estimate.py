"""Estimate: what a configuration that the user fixes would cost, and what the free plan on the same GPUs costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.cost.mixed import MixedCluster
from autopar.errors import InfeasibleError, InputError
from autopar.ir.plan import Plan
from autopar.ir.solution import Pins
from autopar.planner.plan import CapturedGraph, Planned, capture_graph, make_plan
from autopar.planner.request import PlanRequest, Progress, choose_target

UNLIMITED_BYTES = 10**15
"""Memory of the devices that a pinned configuration is priced on: whether it fits is said, not enforced."""


@dataclass(frozen=True)
class Priced:
    """A pinned configuration.

    Attributes:
        planned: its plan; it may need more memory than there is.
        memory_bytes: what a job may really use on one device; 0 on clusters of several types, where it is enforced.
    """

    planned: Planned
    memory_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the predicted peak lies within the memory of the devices."""
        peaks = self.planned.plan.predicted.peak_memory_bytes
        return not self.memory_bytes or max(peak.value for peak in peaks) <= self.memory_bytes


@dataclass(frozen=True)
class Estimate:
    """The user's configuration, and the best plan without its pins."""

    pinned: Priced
    free: Plan


def price_configuration(
    source: str,
    options: Mapping[str, str],
    request: PlanRequest,
    progress: Progress | None = None,
    *,
    captured: CapturedGraph | None = None,
) -> Priced:
    """The plan under the request's pins, by the same search and simulation as any plan.

    Raises:
        InputError: the model, a name or a number is wrong.
        InfeasibleError: nothing satisfies the pins, or keeps the limits.
    """
    target = choose_target(request)
    request = replace(request, with_baselines=False)
    memory_bytes = 0
    if not isinstance(target.cluster, MixedCluster):
        memory_bytes = target.cluster.memory_bytes
        request = replace(request, memory_bytes=UNLIMITED_BYTES)
    planned = make_plan(source, options, request, progress, captured=captured)
    if not memory_bytes:
        return Priced(planned, 0)
    cluster = replace(planned.plan.cluster, memory_bytes=memory_bytes)
    return Priced(replace(planned, plan=replace(planned.plan, cluster=cluster)), memory_bytes)


def estimate_model(
    source: str, options: Mapping[str, str], request: PlanRequest, progress: Progress | None = None
) -> Estimate:
    """Price a configuration beside the free plan.

    Raises:
        InputError: nothing is pinned, or the model or a number is wrong.
        InfeasibleError: no plan under the pins keeps the limits, or no plan fits at all.
    """
    if request.pins == Pins():
        raise InputError("estimate prices a configuration: fix it with --pin, e.g. --pin dp=4,tp=2,pp=1")
    captured = capture_graph(source, options, request.batch_size, progress)
    pinned = price_configuration(source, options, request, progress, captured=captured)
    return Estimate(pinned, free_plan(source, options, request, progress, captured=captured, pinned=pinned))


def free_plan(
    source: str,
    options: Mapping[str, str],
    request: PlanRequest,
    progress: Progress | None = None,
    *,
    captured: CapturedGraph,
    pinned: Priced,
) -> Plan:
    """The best plan without the request's pins; the pinned configuration itself where nothing better was found.

    Raises:
        InfeasibleError: no plan fits.
    """
    free = replace(request, pins=Pins(), with_baselines=False)
    mine = replace(request, with_baselines=False)
    try:
        found = make_plan(source, options, free, progress, captured=captured).plan
    except InfeasibleError:
        if not pinned.fits:
            raise
        return make_plan(source, options, mine, progress, captured=captured).plan
    if pinned.fits and _value(pinned.planned.plan) < _value(found):
        note = "the search found nothing better than the pinned configuration, which it does not enumerate as such"
        own = make_plan(source, options, mine, progress, captured=captured).plan
        return replace(own, notes=(*own.notes, note))
    return found


def _value(plan: Plan) -> float:
    predicted = plan.predicted
    return plan.objective.value(predicted.step_time_s.value, predicted.energy_j.value, plan.decisions.num_gpus)
