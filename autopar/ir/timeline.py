"""Timeline: simulation of a synchronous pipeline schedule, action by action.

Each stage runs its actions in a fixed order, one at a time. `F m` waits for `F m` of the stage before plus the
transfer, `B m` for `B m` of the stage after plus the transfer; a stage's `STEP` (gradient synchronisation and
optimizer) follows its last backward. Transfers take time but occupy no stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.ir.pipeline import effective_schedule

FORWARD, BACKWARD, STEP = "F", "B", "STEP"


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a stage does; `microbatch` is -1 for `STEP`."""

    kind: str
    microbatch: int

    def __str__(self) -> str:
        return self.kind if self.kind == STEP else f"{self.kind}{self.microbatch}"


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
    """

    forward_s: float
    backward_s: float
    step_s: float
    last_backward_s: float | None = None


@dataclass(frozen=True)
class Timeline:
    """What every stage does when; `stages[k]` is in order of time."""

    stages: tuple[tuple[Interval, ...], ...]

    @property
    def makespan_s(self) -> float:
        return max(stage[-1].stop_s for stage in self.stages)

    def busy_s(self, stage: int) -> float:
        """Seconds in which the stage runs anything."""
        return sum(interval.stop_s - interval.start_s for interval in self.stages[stage])


def schedule_actions(stage: int, num_stages: int, num_microbatches: int, schedule: str) -> tuple[Action, ...]:
    """Actions of one stage in order.

    GPipe: all forwards, then all backwards. 1F1B: as many forwards as stages lie from here to the end (at most M),
    then one backward and one forward in turn, then the remaining backwards.

    Raises:
        ValueError: for an unknown schedule.
    """
    runs = effective_schedule(schedule, num_stages, num_microbatches)
    warm_up = num_microbatches if runs == "gpipe" else min(num_stages - stage, num_microbatches)
    actions = [Action(FORWARD, m) for m in range(warm_up)]
    for m in range(num_microbatches):
        actions.append(Action(BACKWARD, m))
        if warm_up + m < num_microbatches:
            actions.append(Action(FORWARD, warm_up + m))
    return (*actions, Action(STEP, -1))


def simulate(
    stages: Sequence[StageTimes], transfer_s: Sequence[float], num_microbatches: int, schedule: str
) -> Timeline:
    """Times of all actions.

    Args:
        stages: one entry per stage, from the input.
        transfer_s: seconds to send from stage k to k + 1, or back; one less than stages.
        num_microbatches: >= 1.
        schedule: one of `ir.pipeline.SCHEDULES`.
    """
    last = len(stages) - 1
    queues = [list(schedule_actions(k, len(stages), num_microbatches, schedule)) for k in range(len(stages))]
    done: dict[tuple[int, Action], float] = {}
    clock = [0.0] * len(stages)
    found: list[list[Interval]] = [[] for _ in stages]

    def ready_s(k: int, action: Action) -> float | None:
        """When the operand arrives; None while its producer has not run."""
        if action.kind == FORWARD and k > 0:
            other = k - 1
        elif action.kind == BACKWARD and k < last:
            other = k + 1
        else:
            return 0.0
        made = done.get((other, action))
        return None if made is None else made + transfer_s[min(k, other)]

    while any(queues):
        for k, queue in enumerate(queues):
            while queue and (ready := ready_s(k, queue[0])) is not None:
                action = queue.pop(0)
                times = stages[k]
                length = {FORWARD: times.forward_s, BACKWARD: times.backward_s, STEP: times.step_s}[action.kind]
                start = max(clock[k], ready)
                clock[k] = done[k, action] = start + length
                found[k].append(Interval(action, start, clock[k]))
    return Timeline(tuple(tuple(stage) for stage in found))
