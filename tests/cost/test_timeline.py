"""Simulated schedules against closed forms and hand-worked grids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.ir.pipeline import microbatches_in_flight, step_time_s
from autopar.ir.timeline import StageTimes, schedule_actions, simulate

SCHEDULES = ("gpipe", "1f1b")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 7, 16])
def test_equal_stages_take_the_closed_form(schedule: str, stages: int, microbatches: int) -> None:
    """(M + K - 1) (f + b) + g, for both schedules."""
    timeline = simulate([StageTimes(1.0, 2.0, 0.5)] * stages, [0.0] * (stages - 1), microbatches, schedule)
    assert timeline.makespan_s == pytest.approx((microbatches + stages - 1) * 3.0 + 0.5)
    assert all(timeline.busy_s(k) == pytest.approx(3.0 * microbatches + 0.5) for k in range(stages))


def test_actions_of_1f1b_follow_the_textbook() -> None:
    orders = [" ".join(map(str, schedule_actions(k, 3, 4, "1f1b"))) for k in range(3)]
    assert orders == [
        "F0 F1 F2 B0 F3 B1 B2 B3 STEP",
        "F0 F1 B0 F2 B1 F3 B2 B3 STEP",
        "F0 B0 F1 B1 F2 B2 F3 B3 STEP",
    ]
    assert " ".join(map(str, schedule_actions(0, 3, 3, "gpipe"))) == "F0 F1 F2 B0 B1 B2 STEP"


def test_unequal_stages_with_transfers_match_the_hand_worked_grid() -> None:
    """Two stages, 1F1B, M = 2: f = 1, 2; b = 2, 3; transfer 0.5.

    stage 0: F0 0-1   F1 1-2                            B0 7-9 (6.5 arrives 7.0)       B1 12-14 (11.5 arrives 12)
    stage 1:   F0 1.5-3.5  B0 3.5-6.5  F1 6.5-8.5  B1 8.5-11.5
    """
    timeline = simulate([StageTimes(1, 2, 0.25), StageTimes(2, 3, 0)], [0.5], 2, "1f1b")
    shown = [[(str(i.action), i.start_s, i.stop_s) for i in stage] for stage in timeline.stages]
    assert shown[0] == [("F0", 0, 1), ("F1", 1, 2), ("B0", 7, 9), ("B1", 12, 14), ("STEP", 14, 14.25)]
    assert shown[1][:4] == [("F0", 1.5, 3.5), ("B0", 3.5, 6.5), ("F1", 6.5, 8.5), ("B1", 8.5, 11.5)]
    assert timeline.makespan_s == 14.25


def test_unequal_stages_under_gpipe_match_the_hand_worked_grid() -> None:
    """Forward 1, 3; backward 2, 1; no transfer, M = 2.

    Stage 1 has F0 1-4, F1 4-7, B0 7-8, B1 8-9; stage 0 has B0 8-10, B1 10-12.
    """
    timeline = simulate([StageTimes(1, 2, 0), StageTimes(3, 1, 0)], [0.0], 2, "gpipe")
    assert [(i.start_s, i.stop_s) for i in timeline.stages[1]][:4] == [(1, 4), (4, 7), (7, 8), (8, 9)]
    assert timeline.makespan_s == 12


@given(
    times=st.lists(
        st.tuples(st.floats(0.1, 10), st.floats(1, 3), st.floats(0, 5)).map(
            lambda t: StageTimes(t[0], t[0] * t[1], t[2])
        ),
        min_size=1, max_size=6,
    ),
    microbatches=st.integers(1, 9),
    schedule=st.sampled_from(SCHEDULES),
)  # fmt: skip
def test_makespan_lies_between_its_bounds_and_the_formula(
    times: list[StageTimes], microbatches: int, schedule: str
) -> None:
    """Below: the busiest stage with what comes before it. Above: no two stages overlap. 1F1B with backward one to three
    times forward stays below the formula of `ir.pipeline`.
    """
    timeline = simulate(times, [0.0] * (len(times) - 1), microbatches, schedule)
    whole = [t.forward_s + t.backward_s for t in times]
    steps = [t.step_s for t in times]
    lower = max(sum(whole[:k]) + microbatches * whole[k] for k in range(len(times)))
    assert lower <= timeline.makespan_s * (1 + 1e-9)
    assert timeline.makespan_s <= microbatches * sum(whole) + max(steps) + 1e-9
    if schedule == "1f1b" and microbatches >= len(times):
        formula = step_time_s(whole, [0.0] * len(times), microbatches)
        assert timeline.makespan_s - max(steps) <= formula * (1 + 1e-9)


@given(
    stages=st.integers(1, 6), microbatches=st.integers(1, 9), schedule=st.sampled_from(SCHEDULES)
)  # fmt: skip
def test_microbatches_in_flight_are_those_of_the_schedule(stages: int, microbatches: int, schedule: str) -> None:
    for k in range(stages):
        alive = worst = 0
        for action in schedule_actions(k, stages, microbatches, schedule):
            alive += {"F": 1, "B": -1, "STEP": 0}[action.kind]
            worst = max(worst, alive)
        assert (alive, worst) == (0, microbatches_in_flight(k, stages, microbatches, schedule))
