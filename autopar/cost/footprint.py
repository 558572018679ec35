"""Footprint: bytes of a pipeline rank on one device, by cause, and over the simulated schedule.

What a rank holds at its worst moment is

    state + largest sum of kept activations that the schedule reaches + largest workspace

as in the search's formula. State lasts (parameters, gradients, optimizer states with master copies); activations follow
the schedule; the workspace is that of the hungriest node. For a parameter that is gathered, it is what its gather keeps
beside the ops of its block: the part above the hungriest op is called buffers. Where software frees gradients, and a
stage that is no chunk holds most during the first backward of a step, the gradients are those that this backward has
made when the sum is largest: that sum is never above the search's formula. Where the allocator's reserve is
metered, each of the moving parts holds a share of slack (`memory.slack_share`).
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.cost.memory import slack_share
from autopar.cost.stages import STATE_CAUSES, StageCost
from autopar.ir.pipeline import microbatches_in_flight
from autopar.ir.software import Software
from autopar.ir.solution import Decisions
from autopar.ir.timeline import BACKWARD, FORWARD, Timeline, most_held, schedule_actions

MEMORY_CAUSES = (*STATE_CAUSES, "activations", "workspace", "buffers", "slack")


def memory_by_cause(
    costs: Sequence[StageCost], rank: int, decisions: Decisions, software: Software
) -> dict[str, float]:
    """Bytes of one rank at its worst moment, by MEMORY_CAUSES; buffers and slack only where there are any.

    Args:
        costs: of every stage; of every chunk, in the order of the model, with interleaving.
        rank: of the pipeline.
        decisions: for the schedule.
        software: for its meter.
    """
    own = costs[rank :: decisions.num_ranks]
    actions = schedule_actions(
        rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule, interleave=decisions.interleave
    )
    kept = most_held(actions, _kept_bytes(costs, rank, decisions))
    workspace = max(cost.workspace_bytes for cost in own)
    ops = max(cost.op_workspace_bytes for cost in own)
    moving = {
        "activations": kept + _largest_block_bytes(costs, rank, decisions),
        "workspace": ops,
        "buffers": workspace - ops,
    }
    slack = slack_share(software)
    used = {cause: size / (1.0 + slack) for cause, size in moving.items()}
    state = {cause: sum(cost.state[cause] for cost in own) for cause in STATE_CAUSES}
    if software.frees_gradients and decisions.interleave == 1:
        state["gradients"] -= _spared_bytes(own[0], rank, decisions)
    used["slack"] = slack * sum(used.values())
    return {**state, **{cause: size for cause, size in used.items() if size or cause in ("activations", "workspace")}}


def _spared_bytes(cost: StageCost, rank: int, decisions: Decisions) -> float:
    """By how much a stage's peak lies below its formula, because gradients come while activations go.

    The first backward starts with all that is kept and no gradients, and gives a block's activations for its gradients,
    block by block; a further one starts with one microbatch less kept. With more microbatches than are in flight
    everything is there at once again.
    """
    flying = microbatches_in_flight(rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule)
    if decisions.num_microbatches > flying:
        return 0.0
    redo = decisions.stages[rank].recompute == "full"
    kept = cost.boundary_bytes if redo else cost.activation_bytes
    extra = cost.largest_block_bytes if redo else 0.0
    gradients = cost.state["gradients"]
    formula = gradients + flying * kept + extra + cost.workspace_bytes
    moments = [gradients]
    if flying > 1:
        moments.append(formula - kept)
    made, left = 0.0, flying * kept
    for block in sorted(cost.memory, reverse=True):
        own = cost.memory[block]
        made += own.gradients
        moments.append(made + left + extra + own.workspace)
        left -= 0.0 if redo else own.activations
    return min(gradients, formula - max(moments))


def memory_timeline(
    costs: Sequence[StageCost], rank: int, decisions: Decisions, timeline: Timeline
) -> tuple[tuple[float, float], ...]:
    """(seconds, bytes) of one rank: what it holds from each moment on, without workspaces."""
    state = sum(sum(cost.state.values()) for cost in costs[rank :: decisions.num_ranks])
    sizes, held = _kept_bytes(costs, rank, decisions), 0.0
    found = [(0.0, state)]
    for interval in timeline.stages[rank]:
        size = sizes[interval.action.chunk]
        if interval.action.kind == FORWARD:
            held += size
            found.append((interval.start_s, state + held))
        elif interval.action.kind == BACKWARD:
            held -= size
            found.append((interval.stop_s, state + held))
    return tuple(found)


def _kept_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> list[float]:
    """What one microbatch leaves in each chunk of a rank until its backward."""
    ranks = decisions.num_ranks
    pairs = zip(costs[rank::ranks], decisions.stages[rank::ranks], strict=True)
    return [cost.boundary_bytes if stage.recompute == "full" else cost.activation_bytes for cost, stage in pairs]


def _largest_block_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> float:
    """Of the blocks that are recomputed as a whole, what the largest holds while that lasts."""
    ranks = decisions.num_ranks
    pairs = zip(costs[rank::ranks], decisions.stages[rank::ranks], strict=True)
    return max((cost.largest_block_bytes for cost, stage in pairs if stage.recompute == "full"), default=0.0)
