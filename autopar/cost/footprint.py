"""Footprint: bytes of a pipeline rank on one device, by cause, and over the simulated schedule.

What a rank holds at its worst moment is the largest of

- state + largest sum of kept activations that the schedule reaches + largest workspace, as in the search's formula
- where optimizer states lie elsewhere, state + the shard of them that is being updated
- during the last backward, block by block: state + activations that are left + the bucket that gradients are copied
  into once all of it are made, while backward runs or at its end

State lasts (parameters, gradients, optimizer states with master copies); activations follow the schedule; the workspace
is that of the hungriest node. For a parameter that is gathered, it is what its gather keeps beside the ops of its
block: the part above the hungriest op is called buffers. So are buckets and, in interleaved and zero-bubble pipelines
whose engine waits for its sends at the end of a step alone, all that was sent. Between the halves of a backward that is
split a microbatch keeps what its second half needs, as activations. Where software frees gradients, and a stage that is
no chunk holds most during the first backward of a step, the gradients are those that this backward has made when the
sum is largest: that sum is never above the search's formula. Where the allocator's reserve is metered, each of the
moving parts holds a share of slack (`memory.slack_share`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autopar.cost.memory import BUCKET_BYTES, Synced, slack_share
from autopar.cost.stages import STATE_CAUSES, StageCost
from autopar.ir.pipeline import microbatches_in_flight, splits_backward
from autopar.ir.software import Software
from autopar.ir.solution import Decisions
from autopar.ir.timeline import FORWARD, STEP, Timeline, held_after, most_held, schedule_actions

MEMORY_CAUSES = (*STATE_CAUSES, "activations", "workspace", "buffers", "slack")


def memory_by_cause(
    costs: Sequence[StageCost], rank: int, decisions: Decisions, software: Software, unseen_share: float = 0.0
) -> dict[str, float]:
    """Bytes of one rank at its worst moment, by MEMORY_CAUSES; buffers and slack only where there are any.

    Args:
        costs: of every stage; of every chunk, in the order of the model, with interleaving.
        rank: of the pipeline.
        decisions: for the schedule.
        software: for its meter.
        unseen_share: of the device.
    """
    own = costs[rank :: decisions.num_ranks]
    slack = slack_share(software, unseen_share)
    worst = max(_moments(costs, rank, decisions, software, 1.0 + slack), key=lambda moment: moment.total)
    ops = min(worst.work, max(cost.op_workspace_bytes for cost in own))
    moving = {"activations": worst.activations, "workspace": ops, "buffers": worst.work - ops + worst.buffers}
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


def _moments(
    costs: Sequence[StageCost], rank: int, decisions: Decisions, software: Software, slack: float
) -> Iterator[Moment]:
    """Moments of a step, of which one is the worst; `slack` is 1 + its share, which costs contain already.

    The first backward starts with all that is kept and, where they are freed, no gradients, and gives a block's
    activations for its gradients, block by block; a further one starts with one microbatch less kept. With more
    microbatches than are in flight everything is there at once again.
    """
    own = costs[rank :: decisions.num_ranks]
    gradients = sum(cost.state["gradients"] for cost in own)
    synced = sum((cost.synced for cost in own), Synced())
    grown = 1.0 + (float(2.0 * synced.early / synced.early_parts) if synced.early else 0.0)
    bucket = min(slack * float(synced.room), max(cost.bucket_limit_bytes for cost in own))
    extra = _largest_block_bytes(costs, rank, decisions)
    work = max(cost.workspace_bytes for cost in own)
    if decisions.interleave > 1 or splits_backward(decisions.schedule, decisions.num_ranks):
        sent = slack * _sent_bytes(costs, rank, decisions) if software.keeps_sent else 0.0
        actions = schedule_actions(
            rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule, interleave=decisions.interleave
        )
        waiting = [cost.waiting_bytes for cost in own]
        yield Moment(gradients, most_held(actions, _kept_bytes(costs, rank, decisions), waiting) + extra, work, sent)
        yield Moment(gradients, 0.0, 0.0, bucket + sent)
        yield Moment(gradients, 0.0, 0.0, max(cost.shard_bytes for cost in own) + sent)
        return
    (cost,), (kept,) = own, _kept_bytes(costs, rank, decisions)
    kept += cost.sent_bytes if software.keeps_sent else 0.0
    flying = microbatches_in_flight(rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule)
    is_fresh = software.frees_gradients and decisions.num_microbatches <= flying
    crossing = slack * _crossing_bytes(costs, rank, decisions)
    yield Moment(cost.early_gradients if is_fresh else gradients, flying * kept + extra, work, crossing)
    if is_fresh and flying > 1:
        yield Moment(gradients, (flying - 1) * kept + extra, work, crossing)
    yield Moment(gradients, 0.0, 0.0, bucket)
    yield Moment(gradients, 0.0, 0.0, cost.shard_bytes)
    limit = gradients + flying * kept + extra + max(work, cost.bucket_limit_bytes)
    redo = decisions.stages[rank].recompute == "full"
    walk = _Backward(cost, (flying if is_fresh else 1) * kept, redo, slack)
    for moment in walk.moments(bucket if software.overlap_gradients else 0.0, grown):
        now = moment.gradients if is_fresh else gradients
        spare = limit - now - moment.activations - moment.work
        yield Moment(now, moment.activations, moment.work, max(0.0, min(moment.buffers, spare)) + crossing)


@dataclass(frozen=True)
class _Backward:
    """Backward of a stage, block by block from its end.

    Attributes:
        cost: of the stage.
        kept: bytes of activations when it starts.
        redo: each block is computed again as a whole before.
        slack: 1 + share of slack.
    """

    cost: StageCost
    kept: float
    redo: bool
    slack: float

    def moments(self, bucket: float, grown: float) -> Iterator[Moment]:
        """While the hungriest op of each block runs, and while buckets are filled.

        A block's activations go as its gradients come. Whenever a bucket of `BUCKET_BYTES` is complete, at the end
        the last, its gradients are copied: then its copy and parts of all before it are there beside what is made, and
        of the op that was the last half its workspace, what it hands on.

        Args:
            bucket: bytes that buckets take at most; 0: none is filled meanwhile.
            grown: 1 + bytes of the part that is left of each byte in a bucket.
        """
        made, left = 0.0, self.kept
        total = sum(part.gradients for part in self.cost.memory.values())
        for block in sorted(self.cost.memory, reverse=True):
            part = self.cost.memory[block]
            left -= part.boundary if self.redo else 0.0
            here = part.activations if self.redo else 0.0
            after = left - (0.0 if self.redo else part.activations)
            parts = self.slack * (grown - 1.0) * _full(made) if bucket else 0.0
            yield Moment(made + part.gradients, left + here, part.workspace, parts)
            ends = [end for end in _bucket_ends(total) if made < end <= made + part.gradients]
            for end in ends if bucket else ():
                undone = 1.0 - (end - made) / part.gradients
                held = after + undone * part.activations
                size = min(bucket, self.slack * (end - _full(end - 1.0) + (grown - 1.0) * end))
                yield Moment(end, held, part.workspace / 2, size)
            made, left = made + part.gradients, after


def _full(made: float) -> float:
    """Bytes of full buckets among gradients of `made` bytes."""
    return made // BUCKET_BYTES * BUCKET_BYTES


def _bucket_ends(total: float) -> list[float]:
    """After how many bytes of gradients each bucket is complete."""
    return [*(BUCKET_BYTES * (i + 1.0) for i in range(int(total // BUCKET_BYTES))), total]


def _crossing_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> float:
    """Buffers of a stage behind the first: the value of the next microbatch, the gradient that is on its way back to
    the stage before, and where a stage follows the gradient that comes from there.
    """
    if not rank or decisions.num_microbatches == 1:
        return 0.0
    after = costs[rank + 1].received_bytes if rank + 1 < len(costs) else 0.0
    return 2 * costs[rank].received_bytes + after


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
    waiting = [cost.waiting_bytes for cost in costs[rank :: decisions.num_ranks]]
    found = [(0.0, state)]
    for interval in timeline.stages[rank]:
        kind = interval.action.kind
        if kind != STEP:
            held += held_after(interval.action, sizes, waiting)
            found.append((interval.start_s if kind == FORWARD else interval.stop_s, state + held))
    return tuple(found)


def offloaded_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> dict[str, float] | None:
    """Bytes of one device of a rank that lie elsewhere at the worst moment; None where the plan offloads nothing."""
    if not decisions.offload:
        return None
    own = costs[rank :: decisions.num_ranks]
    actions = schedule_actions(
        rank, decisions.num_ranks, decisions.num_microbatches, decisions.schedule, interleave=decisions.interleave
    )
    held = {
        "optimizer": sum(cost.offloaded.get("optimizer", 0.0) for cost in own),
        "activations": most_held(actions, [cost.offloaded.get("activations", 0.0) for cost in own]),
    }
    return {name: size for name, size in held.items() if size}


def _kept_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> list[float]:
    """What one microbatch leaves in each chunk of a rank until its backward."""
    ranks = decisions.num_ranks
    pairs = zip(costs[rank::ranks], decisions.stages[rank::ranks], strict=True)
    return [
        (cost.boundary_bytes if stage.recompute == "full" else cost.activation_bytes) + cost.held_bytes
        for cost, stage in pairs
    ]


def _largest_block_bytes(costs: Sequence[StageCost], rank: int, decisions: Decisions) -> float:
    """Of the blocks that are recomputed as a whole, what the largest holds while that lasts."""
    ranks = decisions.num_ranks
    pairs = zip(costs[rank::ranks], decisions.stages[rank::ranks], strict=True)
    return max((cost.largest_block_bytes for cost, stage in pairs if stage.recompute == "full"), default=0.0)
