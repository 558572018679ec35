"""Footprint: bytes of a pipeline rank on one device, by cause, and over the simulated schedule.

What a rank holds at its worst moment is the largest of

- state + largest sum of kept activations that the schedule reaches + largest workspace, as in the search's formula
- during the last backward, block by block: state + activations that are left + the bucket that gradients are copied
  into, which is filled while backward runs, or at its end

State lasts (parameters, gradients, optimizer states with master copies); activations follow the schedule; the workspace
is that of the hungriest node. For a parameter that is gathered, it is what its gather keeps beside the ops of its
block: the part above the hungriest op is called buffers. So are buckets and, in interleaved pipelines whose engine
waits for its sends at the end of a step alone, all that was sent. Where software frees gradients, and a stage that is
no chunk holds most during the first backward of a step, the gradients are those that this backward has made when the
sum is largest: that sum is never above the search's formula. Where the allocator's reserve is metered, each of the
moving parts holds a share of slack (`memory.slack_share`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from autopar.cost.memory import Synced, slack_share
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
    worst = max(_moments(costs, rank, decisions, software), key=lambda moment: moment.total)
    ops = min(worst.work, max(cost.op_workspace_bytes for cost in own))
    moving = {"activations": worst.activations, "workspace": ops, "buffers": worst.work - ops + worst.buffers}
    slack = slack_share(software)
    used = {cause: size / (1.0 + slack) for cause, size in moving.items()}
    state = {cause: sum(cost.state[cause] for cost in own) for cause in STATE_CAUSES}
    state["gradients"] = worst.gradients
    used["slack"] = slack * sum(used.values())
    return {**state, **{cause: size for cause, size in used.items() if size or cause in ("activations", "workspace")}}


class Moment(NamedTuple):
    """Bytes at one moment, without what never changes; `work` are workspaces and gathered parameters."""

    gradients: float
    activations: float
    work: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


def _moments(costs: Sequence[StageCost], rank: int, decisions: Decisions, software: Software) -> Iterator[Moment]:
    """Moments of a step, of which one is the worst.

    The first backward starts with all that is kept and, where they are freed, no gradients, and gives a block's
    activations for its gradients, block by block; a further one starts with one microbatch less kept. With more
    microbatches than are in flight everything is there at once again.
    """
    own = costs[rank :: decisions.num_ranks]
    gradients = sum(cost.state["gradients"] for cost in own)
    synced = sum((cost.synced for cost in own), Synced())
    grown = 1.0 + float(synced.parts / max(synced.scattered, 1.0))
    bucket = min(float(synced.room), max(cost.bucket_limit_bytes for cost in own))
    extra = _largest_block_bytes(costs, rank, decisions)
    work = max(cost.workspace_bytes for cost in own)
    if decisions.interleave > 1:
        sent = _sent_bytes(costs, rank, decisions) if software.keeps_sent else 0.0
        actions = schedule_actions(
            rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule, interleave=decisions.interleave
        )
        yield Moment(gradients, most_held(actions, _kept_bytes(costs, rank, decisions)) + extra, work, sent)
        yield Moment(gradients, 0.0, 0.0, bucket + sent)
        return
    (cost,), (kept,) = own, _kept_bytes(costs, rank, decisions)
    flying = microbatches_in_flight(rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule)
    is_fresh = software.frees_gradients and decisions.num_microbatches <= flying
    yield Moment(0.0 if is_fresh else gradients, flying * kept + extra, work)
    if is_fresh and flying > 1:
        yield Moment(gradients, (flying - 1) * kept + extra, work)
    yield Moment(gradients, 0.0, 0.0, bucket)
    limit = gradients + flying * kept + extra + max(work, cost.bucket_limit_bytes)
    made, left = 0.0, (flying if is_fresh else 1) * kept
    redo = decisions.stages[rank].recompute == "full"
    for block in sorted(cost.memory, reverse=True):
        part = cost.memory[block]
        made += part.gradients
        filled = min(bucket, grown * made) if software.overlap_gradients else 0.0
        now = made if is_fresh else gradients
        spare = limit - now - left - extra - part.workspace
        yield Moment(now, left + extra, part.workspace, max(0.0, min(filled, spare)))
        left -= 0.0 if redo else part.activations


def _sent_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> float:
    """Values and gradients that the chunks of a rank send in one step."""
    chunks = range(rank, len(costs), decisions.num_ranks)
    after = sum(costs[k + 1].received_bytes for k in chunks if k + 1 < len(costs))
    return decisions.num_microbatches * (after + sum(costs[k].received_bytes for k in chunks))


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
