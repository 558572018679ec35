"""The step of a plan in detail: its model captured and its stages priced again."""

from __future__ import annotations

from dataclasses import replace

from autopar.cost.footprint import memory_timeline
from autopar.cost.predict import plan_costs, stage_tables, timeline_of
from autopar.cost.stages import StageCost, overlap_of
from autopar.ir.graph import OpGraph
from autopar.ir.plan import Plan
from autopar.ir.serialize_graph import graph_hash
from autopar.ir.streams import PASSES, Overlap, Streams, one_after_other, stream_intervals
from autopar.planner.choose import Chooser
from autopar.planner.plan import capture_graph
from autopar.planner.request import PlanRequest, Progress, choose_target, say_nothing
from autopar.planner.rival import check_unchanged, policy_pins, request_of
from autopar.report.page_detail import StepDetail
from autopar.report.sharding import block_splits


def make_detail(
    plan: Plan,
    progress: Progress | None = None,
    *,
    request: PlanRequest | None = None,
    graph: OpGraph | None = None,
) -> StepDetail:
    """Simulate a plan again, at the prices of now.

    Args:
        request: that the plan answers; without it, what the plan tells of it, and the default profile.
        graph: of the plan's model, if it is known already; then nothing is loaded.

    Raises:
        InputError, CaptureError: the model can no longer be loaded or captured.
        PlanMismatchError: the model is no longer the one that the plan was made for, or its choices are no more.
    """
    if graph is None:
        graph = capture_graph(plan.model.source, plan.model.options, plan.model.batch_size, progress).graph
    check_unchanged(plan, graph_hash(graph))
    decisions, count = plan.decisions, plan.decisions.num_microbatches
    pins = policy_pins(plan)
    request = request_of(plan, pins) if request is None else replace(request, pins=pins)
    chooser = Chooser(graph, request, choose_target(request), progress or say_nothing)
    tables = chooser.tables(request.pins)
    costs, _ = plan_costs(tables, decisions)
    passes = tuple(
        {name: _streams(cost, overlap_of(own), name) for name in PASSES}
        for cost, own in zip(costs, stage_tables(tables, decisions), strict=True)
    )
    timeline = timeline_of(tables, costs, decisions)
    return StepDetail(
        timeline=timeline,
        passes=passes,
        memory_bytes=tuple(memory_timeline(costs, k, decisions, timeline) for k in range(decisions.num_ranks)),
        dynamic_j=tuple(
            decisions.meshes[k % decisions.num_ranks].num_devices * (count * cost.microbatch_j + cost.step_j)
            for k, cost in enumerate(costs)
        ),
        splits=block_splits(decisions, graph),
    )


def _streams(cost: StageCost, overlap: Overlap, name: str) -> Streams:
    """Of one of PASSES; a forward ends in the passes behind a switch, if there are any."""
    own = stream_intervals(cost.works(), overlap, name)
    return own if cost.passing is None or name != "forward" else one_after_other(own, cost.passing)
