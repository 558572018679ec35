"""The timeline of a plan: its model captured and its stages priced again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cost.predict import plan_costs, stage_tables, timeline_of
from autopar.cost.stages import overlap_of
from autopar.ir.plan import Plan
from autopar.ir.serialize_graph import graph_hash
from autopar.ir.solution import KEPT, Pins
from autopar.ir.streams import PASSES, Streams, stream_intervals
from autopar.ir.timeline import Timeline
from autopar.planner.choose import Chooser
from autopar.planner.plan import capture_graph
from autopar.planner.request import Progress, choose_target, say_nothing
from autopar.planner.rival import check_unchanged, request_of


@dataclass(frozen=True)
class PlanTimeline:
    """What every rank does when.

    Attributes:
        passes: per stage (chunk): both streams of each of `ir.streams.PASSES`.
    """

    timeline: Timeline
    passes: tuple[Mapping[str, Streams], ...]


def make_timeline(plan: Plan, progress: Progress | None = None) -> PlanTimeline:
    """Simulate a plan again, at the prices of now.

    Raises:
        InputError, CaptureError: the model can no longer be loaded or captured.
        PlanMismatchError: the model is no longer the one that the plan was made for, or its choices are no more.
    """
    captured = capture_graph(plan.model.source, plan.model.options, plan.model.batch_size, progress)
    check_unchanged(plan, graph_hash(captured.graph))
    kept = sorted({stage.recompute for stage in plan.decisions.stages} & set(KEPT[1:]))
    request = request_of(plan, Pins(recompute=kept[0] if kept else None))
    chooser = Chooser(captured.graph, request, choose_target(request), progress or say_nothing)
    tables = chooser.tables(request.pins)
    costs, _ = plan_costs(tables, plan.decisions)
    passes = tuple(
        {name: stream_intervals(cost.works(), overlap_of(own), name) for name in PASSES}
        for cost, own in zip(costs, stage_tables(tables, plan.decisions), strict=True)
    )
    return PlanTimeline(timeline_of(tables, costs, plan.decisions), passes)
