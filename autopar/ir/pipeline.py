"""Closed forms and memory rules of synchronous pipelines, shared by search, cost and report.

M microbatches, stages k = 0..K-1 from the input, t_k seconds of forward plus backward of one microbatch, g_k seconds
once a step (gradient synchronisation and optimizer). With t'_k = t_k + g_k / M:

    T = sum_k t'_k + (M - 1) * max_k t'_k

Source: the synchronous 1F1B and GPipe makespan with zero transfer time (Narayanan et al. 2021); exact for equal
stages, an upper bound for forward/backward ratios in [1, 3]. Reported plans are re-timed by simulation.
"""

from __future__ import annotations

from collections.abc import Sequence

SCHEDULES = ("1f1b", "gpipe")


def step_time_s(stage_s: Sequence[float], stage_step_s: Sequence[float], num_microbatches: int) -> float:
    """T of the module docstring.

    Args:
        stage_s: t_k, seconds, one per stage, at least one.
        stage_step_s: g_k, seconds.
        num_microbatches: M >= 1.
    """
    loaded = [t + g / num_microbatches for t, g in zip(stage_s, stage_step_s, strict=True)]
    return sum(loaded) + (num_microbatches - 1) * max(loaded)


def effective_schedule(schedule: str, num_stages: int, num_microbatches: int) -> str:
    """The schedule that really runs: with fewer microbatches than stages the engine has no 1F1B, and GPipe serves.

    Raises:
        ValueError: for a schedule that is not in SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}")
    return "gpipe" if num_microbatches < num_stages else schedule


def microbatches_in_flight(stage: int, num_stages: int, num_microbatches: int, schedule: str) -> int:
    """Activation sets that stage `stage` (from 0) holds at its worst moment."""
    if effective_schedule(schedule, num_stages, num_microbatches) == "gpipe":
        return num_microbatches
    return min(num_stages - stage, num_microbatches)
