"""Streams: computation and collectives of one pipeline stage, side by side.

A device has one computation stream and one communication stream. Each runs its work in order of issue, one thing at a
time; while the communication stream is busy, computation advances at (1 - slowdown) of its speed, so a collective of g
seconds hidden whole costs slowdown * g. Collectives never slow down. Nobody waits for work of no seconds.

With `prefetch` a block's parameters are gathered while the block before it (in order of running) computes: the gather
is issued when that computation starts. A block starts when its gather is done and the one before it has ended. In
backward the scatter of a block's gradients is issued when its computation ends, and so before the gather of the block
after next. Gathering ahead stays inside one pass over the blocks, as in PyTorch's FSDP: the first gather and the last
scatter of a forward or backward of one microbatch are exposed. Without `prefetch` computation waits for each.

With `gradients` a block's synchronisation is issued in the last microbatch's backward when the block has ended, behind
its scatter; what is left of it when the backward is over comes before the update.

Offloaded activations move on a stream of their own, in order of issue, which slows nothing down (copy engines). With
`offload` those of a block go out when it has ended, and come back while the block after it (in order of the model) runs
backward; a pass is over when its moves are. Without it computation waits for each.

Where a schedule splits backward, the gradients of weights are a pass of their own. Synchronisation, which needs them,
then begins when that is over: it hides behind nothing.

Consequences (proven in the tests): a pass takes at least its computation and at least its collectives, at most their
sum; no input that grows makes anything end earlier; hiding is never slower than not hiding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.ir.timeline import StageTimes

PASSES = ("forward", "backward", "last_backward", "weight")


@dataclass(frozen=True, slots=True)
class BlockWork:
    """Seconds of one block, each alone on its stream; of one microbatch, but `sync_s` and `update_s` once a step.

    Attributes:
        forward_s, backward_s: of the computation stream: ops, recompute, and collectives that cannot hide.
        weight_s: of backward, where the schedule splits it: gradients of weights, which are not in `backward_s`.
        gather_s, regather_s: of the block's parameters, needed before its forward and before its backward.
        scatter_s: of its gradients, after its backward.
        sync_s: of its gradients, after its last backward.
        update_s: the optimizer's work.
        out_s, back_s: of its activations to where they are offloaded, after its forward, and back before its backward.
    """

    forward_s: float
    backward_s: float
    gather_s: float = 0.0
    regather_s: float = 0.0
    scatter_s: float = 0.0
    sync_s: float = 0.0
    update_s: float = 0.0
    out_s: float = 0.0
    back_s: float = 0.0
    weight_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Overlap:
    """What hides behind computation.

    Attributes:
        prefetch: gathers and scatters of parameters and their gradients.
        gradients: synchronisation of gradients, behind the last backward.
        slowdown: in [0, 1], share of a collective's time that computation beside it loses; at 1 nothing hides.
        offload: moves of offloaded activations.
    """

    prefetch: bool = False
    gradients: bool = False
    slowdown: float = 0.0
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.slowdown <= 1:
            raise ValueError(f"slowdown {self.slowdown} is not in [0, 1]")


@dataclass(frozen=True, slots=True)
class Span:
    """Work of one block on one stream, seconds since the pass began; `kind` as the fields of `BlockWork`."""

    kind: str
    block: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class Streams:
    """One pass over the blocks. Work of no seconds has no span.

    Attributes:
        computation, communication: in order of time.
        needed_s: when computation, gathers and scatters are done; synchronisation may go on.
        stop_s: when everything is.
    """

    computation: tuple[Span, ...]
    communication: tuple[Span, ...]
    needed_s: float
    stop_s: float


class _Device:
    """Two streams being filled."""

    def __init__(self, slowdown: float) -> None:
        self.speed = 1.0 - slowdown
        self.computation: list[Span] = []
        self.communication: list[Span] = []
        self.passed = 0
        """Collectives that ended before the computation that was issued last."""
        self.moved_s = 0.0
        """When the last move of offloaded activations ends."""

    def move(self, length_s: float, at_s: float) -> float:
        """When a move issued at `at_s` is done."""
        if length_s == 0:
            return at_s
        self.moved_s = max(at_s, self.moved_s) + length_s
        return self.moved_s

    def issue(self, kind: str, block: int, length_s: float, at_s: float) -> float:
        """When a collective issued at `at_s` is done."""
        if length_s == 0:
            return at_s
        start = max(at_s, self.communication[-1].stop_s) if self.communication else at_s
        self.communication.append(Span(kind, block, start, start + length_s))
        return start + length_s

    def compute(self, kind: str, block: int, length_s: float, at_s: float) -> float:
        """When computation that starts at `at_s` is done, all collectives beside it being issued."""
        now, left = at_s, length_s
        while left > 0 and self.passed < len(self.communication):
            beside = self.communication[self.passed]
            alone = max(0.0, beside.start_s - now)
            if left <= alone:
                break
            if beside.stop_s > now:
                left -= alone
                now = max(now, beside.start_s)
                slowed = (beside.stop_s - now) * self.speed
                if left <= slowed:
                    now += left / self.speed
                    left = 0.0
                    break
                left -= slowed
                now = beside.stop_s
            self.passed += 1
        if length_s > 0:
            self.computation.append(Span(kind, block, at_s, now + left))
        return now + left

    def streams(self, needed_s: float) -> Streams:
        stop = max(needed_s, self.communication[-1].stop_s) if self.communication else needed_s
        return Streams(tuple(self.computation), tuple(self.communication), needed_s, stop)


def _forward(blocks: Sequence[BlockWork], overlap: Overlap) -> Streams:
    device, now = _Device(overlap.slowdown), 0.0
    gathered = device.issue("gather", 0, blocks[0].gather_s, now)
    for index, block in enumerate(blocks):
        start = now = max(now, gathered)
        if overlap.prefetch and index + 1 < len(blocks):
            gathered = device.issue("gather", index + 1, blocks[index + 1].gather_s, start)
        now = device.compute("forward", index, block.forward_s, start)
        moved = device.move(block.out_s, now)
        now = now if overlap.offload else moved
        if not overlap.prefetch and index + 1 < len(blocks):
            gathered = device.issue("gather", index + 1, blocks[index + 1].gather_s, now)
    return device.streams(max(now, device.moved_s))


def _backward(blocks: Sequence[BlockWork], overlap: Overlap, last: bool) -> Streams:
    device, now, needed = _Device(overlap.slowdown), 0.0, 0.0
    final = len(blocks) - 1
    gathered = device.issue("regather", final, blocks[final].regather_s, now)
    back = device.move(blocks[final].back_s, now)
    for index in range(final, -1, -1):
        block = blocks[index]
        start = now = max(now, gathered, back)
        if overlap.offload and index > 0:
            back = device.move(blocks[index - 1].back_s, start)
        if overlap.prefetch and index > 0:
            gathered = device.issue("regather", index - 1, blocks[index - 1].regather_s, start)
        now = device.compute("backward", index, block.backward_s, start)
        scattered = device.issue("scatter", index, block.scatter_s, now)
        needed = max(needed, scattered)
        if not overlap.prefetch:
            now = scattered
        if last and overlap.gradients:
            device.issue("sync", index, block.sync_s, now)
        if not overlap.prefetch and index > 0:
            gathered = device.issue("regather", index - 1, blocks[index - 1].regather_s, now)
        if not overlap.offload and index > 0:
            back = device.move(blocks[index - 1].back_s, now)
    return device.streams(max(now, needed))


def pass_intervals(compute_s: float, send_s: float, return_s: float, count: int, slowdown: float) -> Streams:
    """Both streams while the blocks behind a switch run in passes (`ir.passes`); the `block` of a span is its pass.

    A pass computes when its samples have come. Then the samples of the next are sent beside it, and its gradient goes
    back when it has ended.

    Args:
        compute_s: forward and backward of one pass.
        send_s, return_s: of its samples to all ranks, and of their gradient back.
        count: passes, >= 1.
        slowdown: see `Overlap`.
    """
    device, now = _Device(slowdown), 0.0
    sent = device.issue("send", 0, send_s, now)
    returned = 0.0
    for index in range(count):
        start = max(now, sent)
        if index + 1 < count:
            sent = device.issue("send", index + 1, send_s, start)
        now = device.compute("pass", index, compute_s, start)
        returned = device.issue("return", index, return_s, now)
    return device.streams(max(now, returned))


def _weight(blocks: Sequence[BlockWork]) -> Streams:
    device, now = _Device(0.0), 0.0
    for index in range(len(blocks) - 1, -1, -1):
        now = device.compute("weight", index, blocks[index].weight_s, now)
    return device.streams(now)


def one_after_other(first: Streams, then: Streams) -> Streams:
    """Both, the second beginning where the first has stopped."""
    begin = first.stop_s
    later = [
        tuple(replace(span, start_s=begin + span.start_s, stop_s=begin + span.stop_s) for span in spans)
        for spans in (then.computation, then.communication)
    ]
    return Streams(
        (*first.computation, *later[0]), (*first.communication, *later[1]), begin + then.needed_s, begin + then.stop_s
    )


def stream_intervals(blocks: Sequence[BlockWork], overlap: Overlap, phase: str) -> Streams:
    """Both streams during one pass.

    Args:
        blocks: of the stage, in the order of forward; at least one.
        overlap: what hides.
        phase: one of PASSES; "last_backward" differs where `overlap.gradients` holds.

    Raises:
        ValueError: for an unknown phase.
    """
    if phase not in PASSES:
        raise ValueError(f"unknown pass {phase!r}; one of {', '.join(PASSES)}")
    if phase == "forward":
        return _forward(blocks, overlap)
    if phase == "weight":
        return _weight(blocks)
    return _backward(blocks, overlap, last=phase == "last_backward" and not any(block.weight_s for block in blocks))


def stage_times(blocks: Sequence[BlockWork], overlap: Overlap) -> StageTimes:
    """What the stage takes, for `ir.timeline.simulate`.

    `last_backward_s` is there where synchronisation hides; `step_s` then holds what is left of it, and the updates.
    """
    update, weight_s = sum(b.update_s for b in blocks), sum(b.weight_s for b in blocks)
    forward_s = _time_s(blocks, overlap, "forward")
    backward_s = _time_s(blocks, overlap, "backward") + weight_s
    if not overlap.gradients or weight_s:
        return StageTimes(forward_s, backward_s, sum(b.sync_s for b in blocks) + update, weight_s=weight_s)
    last = _backward(blocks, overlap, last=True)
    if not any(b.sync_s for b in blocks):
        return StageTimes(forward_s, backward_s, update, backward_s)
    exposed_s = last.stop_s - last.needed_s
    return StageTimes(forward_s, backward_s, exposed_s + update, last.needed_s, exposed_s)


def _time_s(blocks: Sequence[BlockWork], overlap: Overlap, phase: str) -> float:
    """Of a pass; where nothing can hide, the plain sums in the order of the blocks."""
    if phase == "forward":
        compute, moved = [b.forward_s for b in blocks], [b.gather_s for b in blocks]
        outside = [b.out_s for b in blocks]
    else:
        compute, moved = [b.backward_s for b in blocks], [b.regather_s + b.scatter_s for b in blocks]
        outside = [b.back_s for b in blocks]
    if (overlap.prefetch and any(moved)) or (overlap.offload and any(outside)):
        return stream_intervals(blocks, overlap, phase).stop_s
    return sum(compute) + sum(moved) + sum(outside)
