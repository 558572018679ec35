"""Timeline: simulation of a synchronous pipeline schedule, action by action.

Each stage runs its actions in a fixed order, one at a time. `F m` waits for `F m` of the stage before plus the
transfer, `B m` for `B m` of the stage after plus the transfer; a stage's `STEP` (gradient synchronisation and
optimizer) follows its last backward. Transfers take time but occupy no stage, unless sends block.

Under interleaved 1F1B the model is cut into K * v chunks, and rank k of K runs chunks k, k + K, ... by turns, in the
order of Megatron-LM (Narayanan et al. 2021): K microbatches through one of its chunks, the same K through the next,
and so on; backward the same with the chunks from the last to the first.

Under zero-bubble (ZB-H1 of Qi et al. 2024, in the order of torch's `ScheduleInterleavedZeroBubble`) `B m` is the
gradient of the inputs alone, for which the stage before waits, and `W m` that of the weights, which fills what was a
bubble: rank k runs its first W after its (k + 1)-th B, one after every B from there on, and the rest at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.ir.pipeline import (
    FORWARD_ONLY,
    check_interleave,
    check_zero_bubble,
    chunks_in_flight,
    microbatches_in_flight,
    ranks_of,
    splits_backward,
)

FORWARD, BACKWARD, WEIGHT, STEP = "F", "B", "W", "STEP"


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a stage does; `microbatch` is -1 for `STEP`, `chunk` counts the chunks of the rank from 0."""

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        if self.kind == STEP:
            return self.kind
        return f"{self.kind}{self.microbatch}.{self.chunk}" if self.chunk else f"{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Interval:
    """An action with its times, seconds since the step began."""

    action: Action
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one stage: forward and backward of one microbatch, `step_s` once a step.

    Attributes:
        last_backward_s: of the step's last microbatch, where gradients are synchronised beside it; None: as the others.
        exposed_s: the part of `step_s` that synchronises gradients beside what the rank does next: backwards of other
            chunks, if it has any left.
        weight_s: the part of `backward_s` that a schedule may do apart and later: gradients of weights.
    """

    forward_s: float
    backward_s: float
    step_s: float
    last_backward_s: float | None = None
    exposed_s: float = 0.0
    weight_s: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """What every stage does when; `stages[k]` is in order of time (of rank k, where ranks have several chunks)."""

    stages: tuple[tuple[Interval, ...], ...]

    @property
    def makespan_s(self) -> float:
        return max(stage[-1].stop_s for stage in self.stages)

    def busy_s(self, stage: int) -> float:
        """Seconds in which the stage runs anything."""
        return sum(interval.stop_s - interval.start_s for interval in self.stages[stage])


def schedule_actions(
    stage: int, num_stages: int, num_microbatches: int, schedule: str, *, interleave: int = 1
) -> tuple[Action, ...]:
    """Actions of one stage, or of one rank of `interleave` chunks, in order.

    GPipe: all forwards, then all backwards. 1F1B: as many forwards as stages lie from here to the end (at most M),
    then one backward and one forward in turn, then the remaining backwards. Interleaved 1F1B: more forwards at first
    (`ir.pipeline.chunks_in_flight`). Zero-bubble: see the module docstring. For inference: all forwards, and no more.

    Raises:
        ValueError: for an unknown schedule, or one that cannot run.
    """
    check_interleave(num_stages, num_microbatches, schedule, interleave)
    check_zero_bubble(num_stages, num_microbatches, schedule)
    turns = _turns(num_stages if interleave > 1 else 1, num_microbatches, interleave)
    if schedule == FORWARD_ONLY:
        return tuple(Action(FORWARD, m) for m, _ in turns)
    if interleave > 1:
        warm_up = chunks_in_flight(stage, num_stages, num_microbatches, interleave, schedule)
    else:
        warm_up = microbatches_in_flight(stage, num_stages, num_microbatches, schedule)
    actions = [Action(FORWARD, m, chunk) for m, chunk in turns[:warm_up]]
    later: list[Action] = []
    for i, (m, chunk) in enumerate(turns):
        actions.append(Action(BACKWARD, m, interleave - 1 - chunk))
        if splits_backward(schedule, num_stages):
            later.append(Action(WEIGHT, m, interleave - 1 - chunk))
            actions += [later.pop(0)] if i >= stage else []
        if warm_up + i < len(turns):
            actions.append(Action(FORWARD, *turns[warm_up + i]))
    return (*actions, *later, Action(STEP, -1))


def _turns(group: int, num_microbatches: int, interleave: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) in the order of forward; `group` microbatches pass one chunk before the next chunk's turn."""
    return [
        (first + m, chunk)
        for first in range(0, num_microbatches, group)
        for chunk in range(interleave)
        for m in range(group)
    ]


def most_held(
    actions: Sequence[Action], chunk_size: Sequence[float], weight_size: Sequence[float] | None = None
) -> float:
    """Largest sum, over time, of what forwards leave and backwards free; `chunk_size` is per chunk of the rank.

    Args:
        weight_size: likewise, what B leaves for W.
    """
    held = most = 0.0
    for action in actions:
        held += held_after(action, chunk_size, weight_size)
        most = max(most, held)
    return most


def held_after(action: Action, chunk_size: Sequence[float], weight_size: Sequence[float] | None = None) -> float:
    """By how much an action changes what is held, sizes as in `most_held`; without `weight_size` B leaves nothing."""
    chunk = action.chunk
    later = 0.0 if weight_size is None or action.kind == STEP else weight_size[chunk]
    if action.kind == FORWARD:
        return chunk_size[chunk]
    if action.kind == BACKWARD:
        return later - chunk_size[chunk]
    return -later if action.kind == WEIGHT else 0.0


def simulate(
    stages: Sequence[StageTimes], transfer_s: Sequence[float], num_microbatches: int, schedule: str,
    *, interleave: int = 1, blocking_sends: bool = False,
) -> Timeline:  # fmt: skip
    """Times of all actions.

    Args:
        stages: one entry per stage, from the input; one per chunk with `interleave`, in the order of the model.
        transfer_s: seconds to send from stage (chunk) k to k + 1, or back; one less than stages.
        num_microbatches: >= 1.
        schedule: one of `ir.pipeline.SCHEDULES`.
        interleave: chunks per rank.
        blocking_sends: a transfer begins when its receiver is free, and occupies it; what it sends itself goes out
            meanwhile, as where sends and receives are exchanged between two computations.

    Raises:
        ValueError: for an unknown schedule, or one that cannot run (`ir.pipeline.check_interleave`).
    """
    num_ranks = ranks_of(len(stages), interleave)
    each = range(num_ranks)
    queues = [schedule_actions(k, num_ranks, num_microbatches, schedule, interleave=interleave) for k in each]
    is_split = splits_backward(schedule, num_ranks)
    lengths = [_lengths(times, is_split=is_split) for times in stages]
    done: dict[tuple[int, str, int], float] = {}
    clock = [0.0] * num_ranks
    found: list[list[Interval]] = [[] for _ in each]

    def start_s(k: int, action: Action) -> float | None:
        """When the action can start; None while the producer of its operand has not run."""
        at = action.chunk * num_ranks + k
        other = at - 1 if action.kind == FORWARD else at + 1
        if action.kind in (WEIGHT, STEP) or not 0 <= other < len(stages):
            return clock[k]
        made = done.get((other, action.kind, action.microbatch))
        if made is None:
            return None
        transfer = transfer_s[min(at, other)]
        return max(clock[k], made) + transfer if blocking_sends else max(clock[k], made + transfer)

    while any(len(own) < len(queue) for own, queue in zip(found, queues, strict=True)):
        for k, queue in enumerate(queues):
            while len(found[k]) < len(queue):
                action = queue[len(found[k])]
                start = start_s(k, action)
                if start is None:
                    break
                at = action.chunk * num_ranks + k
                is_last = action.microbatch == num_microbatches - 1
                if action.kind == STEP:
                    last = WEIGHT if is_split else BACKWARD
                    ends = [done[c, last, num_microbatches - 1] for c in range(k, len(stages), num_ranks)]
                    clock[k] = start + _step_s(stages[k::num_ranks], ends)
                else:
                    clock[k] = start + lengths[at][action.kind, is_last]
                done[at, action.kind, action.microbatch] = clock[k]
                found[k].append(Interval(action, start, clock[k]))
    return Timeline(tuple(tuple(stage) for stage in found))


def _lengths(times: StageTimes, *, is_split: bool) -> dict[tuple[str, bool], float]:
    """Seconds by kind, and whether of the last microbatch; where backward is split, what its end hides goes with W."""
    last = times.backward_s if times.last_backward_s is None else times.last_backward_s
    if is_split:
        inputs_s = times.backward_s - times.weight_s
        return {
            (FORWARD, False): times.forward_s,
            (FORWARD, True): times.forward_s,
            (BACKWARD, False): inputs_s,
            (BACKWARD, True): inputs_s,
            (WEIGHT, False): times.weight_s,
            (WEIGHT, True): last - inputs_s,
        }
    return {
        (FORWARD, False): times.forward_s,
        (FORWARD, True): times.forward_s,
        (BACKWARD, False): times.backward_s,
        (BACKWARD, True): last,
    }


def _step_s(chunks: Sequence[StageTimes], ends_s: Sequence[float]) -> float:
    """From a rank's last backward to its end; the last backward of each chunk ended at `ends_s`."""
    if len(chunks) == 1:
        return chunks[0].step_s
    synchronised_s = max(end + times.exposed_s for end, times in zip(ends_s, chunks, strict=True))
    return synchronised_s - max(ends_s) + sum(times.step_s - times.exposed_s for times in chunks)
