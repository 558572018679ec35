"""Closed forms and memory rules of synchronous pipelines, shared by search, cost and report.

M microbatches, stages k = 0..K-1 from the input, t_k seconds of forward plus backward of one microbatch, g_k seconds
once a step (gradient synchronisation and optimizer). With t'_k = t_k + g_k / M:

    T = sum_k t'_k + (M - 1) * max_k t'_k

With v > 1 the model is cut into K * v chunks, chunk c on rank c % K (interleaved 1F1B), and with t'_k summed over the
chunks of rank k the bubble shrinks to a v-th:

    T = M * max_k t'_k + (sum_k t'_k - max_k t'_k) / v

Source: the synchronous 1F1B, interleaved 1F1B and GPipe makespans with zero transfer time (Narayanan et al. 2021);
exact for equal stages or chunks; the first errs by a few per cent, nearly always upwards, where stages differ and
backward takes one to three times forward. Reported plans are re-timed by simulation.
"""

from __future__ import annotations

from collections.abc import Sequence

ZERO_BUBBLE = "zero-bubble"
SCHEDULES = ("1f1b", "gpipe", ZERO_BUBBLE)
FORWARD_ONLY = "forward"
"""Schedule of inference: every microbatch forward through the stages, and nothing back."""


def step_time_s(
    stage_s: Sequence[float], stage_step_s: Sequence[float], num_microbatches: int, interleave: int = 1
) -> float:
    """T of the module docstring.

    Args:
        stage_s: seconds, one per stage, at least one; with `interleave` one per chunk, in the order of the model.
        stage_step_s: seconds once a step, likewise.
        num_microbatches: M >= 1.
        interleave: v, chunks per rank.
    """
    loaded = [t + g / num_microbatches for t, g in zip(stage_s, stage_step_s, strict=True)]
    if interleave > 1:
        num_ranks = ranks_of(len(loaded), interleave)
        loaded = [sum(loaded[k::num_ranks]) for k in range(num_ranks)]
        return num_microbatches * max(loaded) + (sum(loaded) - max(loaded)) / interleave
    return sum(loaded) + (num_microbatches - 1) * max(loaded)


def ranks_of(num_chunks: int, interleave: int) -> int:
    """K, for `num_chunks` = K * `interleave`.

    Raises:
        ValueError: if the chunks do not divide.
    """
    if num_chunks % interleave:
        raise ValueError(f"{num_chunks} chunks do not divide into ranks of {interleave} chunks each")
    return num_chunks // interleave


def splits_backward(schedule: str, num_ranks: int) -> bool:
    """Whether gradients of weights are computed apart from those of inputs, when there is nothing else to do."""
    return schedule == ZERO_BUBBLE and num_ranks > 1


def check_zero_bubble(num_ranks: int, num_microbatches: int, schedule: str) -> None:
    """Passes what the zero-bubble schedule can run; everything under another schedule, or on one rank.

    Microbatches go in M // K rounds of equal size (`ScheduleInterleavedZeroBubble` of torch).

    Raises:
        ValueError: saying why there is no such schedule.
    """
    if not splits_backward(schedule, num_ranks):
        return
    rounds = num_microbatches // num_ranks
    if not rounds or num_microbatches % rounds:
        raise ValueError(
            f"schedule 'zero-bubble' over {num_ranks} pipeline ranks needs at least as many microbatches, in equal "
            f"rounds: a multiple of {num_ranks}, not {num_microbatches}"
        )


def effective_schedule(schedule: str, num_stages: int, num_microbatches: int) -> str:
    """The schedule that really runs: with fewer microbatches than stages the engine has no 1F1B, and GPipe serves.

    A plan with the zero-bubble schedule and so few is refused (`check_zero_bubble`).

    Raises:
        ValueError: for a schedule that is not in SCHEDULES.
    """
    if schedule == FORWARD_ONLY:
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}")
    return "gpipe" if num_microbatches < num_stages else schedule


def holds_all(schedule: str, num_stages: int, num_microbatches: int) -> bool:
    """Whether every stage holds what all microbatches leave: until the backwards begin, or the step is over."""
    return effective_schedule(schedule, num_stages, num_microbatches) in ("gpipe", FORWARD_ONLY)


def microbatches_in_flight(stage: int, num_stages: int, num_microbatches: int, schedule: str) -> int:
    """Activation sets that stage `stage` (from 0) holds at its worst moment."""
    if holds_all(schedule, num_stages, num_microbatches):
        return num_microbatches
    return min(num_stages - stage, num_microbatches)


def check_interleave(num_ranks: int, num_microbatches: int, schedule: str, interleave: int) -> None:
    """Passes what interleaved 1F1B can run; everything where `interleave` is 1.

    Raises:
        ValueError: saying why there is no such schedule.
    """
    if interleave < 1:
        raise ValueError(f"a rank has at least one chunk, not {interleave}")
    if interleave == 1:
        return
    if schedule not in ("1f1b", ZERO_BUBBLE):
        raise ValueError(f"{interleave} chunks per rank need schedule '1f1b' or 'zero-bubble', not {schedule!r}")
    if num_microbatches % num_ranks:
        name = "interleaved 1F1B" if schedule == "1f1b" else "the interleaved zero-bubble schedule"
        raise ValueError(f"{name} needs microbatches in multiples of the {num_ranks} ranks, not {num_microbatches}")


def chunks_in_flight(rank: int, num_ranks: int, num_microbatches: int, interleave: int, schedule: str = "1f1b") -> int:
    """Activation sets of one chunk and one microbatch that rank `rank` (from 0) holds at its worst moment.

    With v > 1: 2 (K - k - 1) + (v - 1) K forwards before the first that has a backward behind it, and that one; at most
    all M * v (the order of Megatron-LM, Narayanan et al. 2021). Under zero-bubble K - k - 1 in place of twice that.

    Raises:
        ValueError: see `check_interleave`.
    """
    check_interleave(num_ranks, num_microbatches, schedule, interleave)
    if interleave == 1:
        return microbatches_in_flight(rank, num_ranks, num_microbatches, schedule)
    behind = (1 if schedule == ZERO_BUBBLE else 2) * (num_ranks - rank - 1)
    return min(behind + (interleave - 1) * num_ranks + 1, num_microbatches * interleave)
