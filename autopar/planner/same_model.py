"""Is the model that a run captures the one that its plan was made for?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.errors import PlanMismatchError
from autopar.ir.graph import OpGraph
from autopar.ir.plan import Plan
from autopar.ir.serialize_graph import graph_hash

if TYPE_CHECKING:
    from autopar.capture.source import ModelSource


def check_same_model(plan: Plan, graph: OpGraph, source: ModelSource) -> None:
    """Rank 0 compares the whole graph at the global batch size; every rank compares the names of the ops.

    Args:
        graph: captured at the microbatch size.

    Raises:
        PlanMismatchError: they differ.
    """
    import torch.distributed as dist

    from autopar.capture.export import capture

    if not dist.is_initialized() or dist.get_rank() == 0:
        found = graph_hash(capture(source, batch_size=plan.model.batch_size).graph)
        if found != plan.model.graph_hash:
            raise PlanMismatchError(
                f"the plan was made for another model or batch: {plan.model.source} had graph "
                f"{plan.model.graph_hash[:12]}, now it is {found[:12]}; make the plan again"
            )
    check_names(plan, graph, "microbatch")


def check_names(plan: Plan, graph: OpGraph, part: str) -> None:
    """Raises PlanMismatchError unless the ops of the graph, of a `part` of a batch, are those of the plan."""
    names, planned = {op.name for op in graph.ops}, set(plan.decisions.ops)
    if names != planned:
        shown = ", ".join(sorted(names ^ planned)[:5])
        raise PlanMismatchError(f"the model has other ops at the {part} size than in the plan: {shown}")
