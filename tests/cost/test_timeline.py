"""Simulated schedules against closed forms and hand-worked grids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.ir.pipeline import chunks_in_flight, microbatches_in_flight, step_time_s
from autopar.ir.timeline import Action, StageTimes, most_held, schedule_actions, simulate

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
def test_makespan_lies_between_its_bounds(times: list[StageTimes], microbatches: int, schedule: str) -> None:
    """Below: the busiest stage with what comes before it. Above: no two stages overlap; 1F1B paces itself by at most
    the longest forward and the longest backward, which may lie on different stages.
    """
    timeline = simulate(times, [0.0] * (len(times) - 1), microbatches, schedule)
    whole = [t.forward_s + t.backward_s for t in times]
    steps = [t.step_s for t in times]
    lower = max(sum(whole[:k]) + microbatches * whole[k] for k in range(len(times)))
    assert lower <= timeline.makespan_s * (1 + 1e-9)
    assert timeline.makespan_s <= microbatches * sum(whole) + max(steps) + 1e-9
    if schedule == "1f1b" and microbatches >= len(times):
        pace = max(t.forward_s for t in times) + max(t.backward_s for t in times)
        assert timeline.makespan_s - max(steps) <= (sum(whole) + (microbatches - 1) * pace) * (1 + 1e-9)


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


RANKS = st.integers(1, 5)
CHUNKS = st.integers(2, 4)
SECONDS = st.integers(0, 20).map(lambda n: n / 4)


@given(ranks=RANKS, rounds=st.integers(1, 4), chunks=CHUNKS, forward_s=SECONDS, backward_s=SECONDS)
def test_equal_chunks_take_the_closed_form(
    ranks: int, rounds: int, chunks: int, forward_s: float, backward_s: float
) -> None:
    """(M + (K - 1) / v) (f + b), of a rank's whole f and b, and the formula says the same."""
    count = ranks * rounds
    times = [StageTimes(forward_s / chunks, backward_s / chunks, 0.0)] * (ranks * chunks)
    timeline = simulate(times, [0.0] * (len(times) - 1), count, "1f1b", interleave=chunks)
    closed = (count + (ranks - 1) / chunks) * (forward_s + backward_s)
    assert timeline.makespan_s == pytest.approx(closed)
    whole = [t.forward_s + t.backward_s for t in times]
    assert step_time_s(whole, [0.0] * len(times), count, chunks) == pytest.approx(closed)


def test_actions_of_interleaved_1f1b_follow_the_textbook() -> None:
    """Two ranks of two chunks, four microbatches, as drawn by Narayanan et al. 2021 for four ranks."""
    orders = [" ".join(map(str, schedule_actions(k, 2, 4, "1f1b", interleave=2))) for k in range(2)]
    assert orders == [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3 STEP",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3 STEP",
    ]


def test_unequal_chunks_with_transfers_match_the_hand_worked_grid() -> None:
    """Two ranks of two chunks, M = 2; forward 1, 2, 3, 1 of chunks 0 to 3, backward 2; transfer 0.5.

    rank 0: F0 0-1, F1 1-2, then chunk 2 when chunk 1 has arrived: 4-7 and 7-10; its backward at 11 and 14.
    rank 1: F0 1.5-3.5, F1 3.5-5.5, chunk 3 when 7.5 arrives: F0.1 7.5-8.5, B0.1, F1.1, B1.1 until 13.5, B0 at once
    (13.5 arrives), B1 when 16.5 arrives.
    """
    times = [StageTimes(1, 2, 0.25), StageTimes(2, 2, 0), StageTimes(3, 2, 0.5), StageTimes(1, 2, 0)]
    timeline = simulate(times, [0.5] * 3, 2, "1f1b", interleave=2)
    shown = [" ".join(f"{i.action}:{i.start_s:g}-{i.stop_s:g}" for i in rank) for rank in timeline.stages]
    assert shown == [
        "F0:0-1 F1:1-2 F0.1:4-7 F1.1:7-10 B0.1:11-13 B1.1:14-16 B0:16-18 B1:19-21 STEP:21-21.75",
        "F0:1.5-3.5 F1:3.5-5.5 F0.1:7.5-8.5 B0.1:8.5-10.5 F1.1:10.5-11.5 B1.1:11.5-13.5 B0:13.5-15.5 B1:16.5-18.5"
        " STEP:18.5-18.5",
    ]


@given(ranks=RANKS, rounds=st.integers(1, 4), chunks=st.integers(1, 4))
def test_chunks_in_flight_are_those_of_the_schedule(ranks: int, rounds: int, chunks: int) -> None:
    count = ranks * rounds
    for k in range(ranks):
        actions = schedule_actions(k, ranks, count, "1f1b", interleave=chunks)
        assert most_held(actions, [1.0] * chunks) == chunks_in_flight(k, ranks, count, chunks)
        whole = {(kind, m, c) for kind in "FB" for m in range(count) for c in range(chunks)}
        assert sorted((a.kind, a.microbatch, a.chunk) for a in actions[:-1]) == sorted(whole)


def test_most_held_weighs_chunks() -> None:
    """F0 F1 F0.1 leave 2 + 2 + 5, F1.1 as much as B0.1 freed."""
    assert most_held(schedule_actions(1, 2, 2, "1f1b", interleave=2), [2.0, 5.0]) == 9
    assert most_held([Action("F", 0), Action("B", 0), Action("STEP", -1)], [3.0]) == 3


CHUNK_TIMES = st.builds(
    lambda *t: StageTimes(t[0], t[1], t[2] + t[4], t[3], t[4]),
    SECONDS, SECONDS, SECONDS, st.one_of(st.none(), SECONDS), SECONDS,
)  # fmt: skip


@given(
    data=st.data(), ranks=RANKS, rounds=st.integers(1, 3), chunks=st.integers(1, 3), blocking_sends=st.booleans()
)  # fmt: skip
def test_a_timeline_is_a_longest_path(
    data: st.DataObject, ranks: int, rounds: int, chunks: int, blocking_sends: bool
) -> None:
    """Every action starts just when the last of what it waits for is over: another way to time the same order."""
    last, count = ranks * chunks - 1, ranks * rounds
    times = data.draw(st.lists(CHUNK_TIMES, min_size=last + 1, max_size=last + 1))
    sends = data.draw(st.lists(SECONDS, min_size=last, max_size=last))
    timeline = simulate(times, sends, count, "1f1b", interleave=chunks, blocking_sends=blocking_sends)
    stops = {
        (i.action.kind, i.action.microbatch, i.action.chunk * ranks + k): i.stop_s
        for k, rank in enumerate(timeline.stages)
        for i in rank
        if i.action.kind != "STEP"
    }
    assert len(stops) == 2 * count * (last + 1)
    for k, rank in enumerate(timeline.stages):
        before = 0.0
        for interval in rank:
            kind, m, c = interval.action.kind, interval.action.microbatch, interval.action.chunk * ranks + k
            if kind == "STEP":
                over = max(stops["B", count - 1, c] + times[c].exposed_s for c in range(k, last + 1, ranks))
                update = sum(t.step_s - t.exposed_s for t in times[k::ranks])
                start, length = before, max(over, before) - before + update
            else:
                source = c - 1 if kind == "F" else c + 1
                made, send = stops.get((kind, m, source)), sends[min(c, source)] if 0 <= source <= last else 0.0
                own = before if made is None or not blocking_sends else before + send
                start = own if made is None else max(own, made + send)
                ending = times[c].last_backward_s if m == count - 1 else None
                length = times[c].forward_s if kind == "F" else times[c].backward_s if ending is None else ending
            assert (interval.start_s, interval.stop_s) == pytest.approx((start, start + length))
            before = interval.stop_s


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hidden_synchronisation_lengthens_each_stages_last_backward(schedule: str) -> None:
    """M = 2, two stages, forward 1, backward 2, but 3 the last time: of stage 1 first, then of stage 0."""
    timeline = simulate([StageTimes(1, 2, 0.5, 3)] * 2, [0.0], 2, schedule)
    plain = simulate([StageTimes(1, 2, 0.5)] * 2, [0.0], 2, schedule)
    assert timeline.makespan_s == plain.makespan_s + 2


def test_synchronisation_of_a_chunk_hides_behind_the_next() -> None:
    """One rank of two chunks, M = 1: chunk 1 ends at 4, chunk 0 at 6; two updates of 1 follow at 4 + 3, or at 6 + 3."""
    early = [StageTimes(1, 2, 1, 2), StageTimes(1, 2, 4, 2, 3)]
    assert simulate(early, [0.0], 1, "1f1b", interleave=2).makespan_s == 9
    assert simulate(early[::-1], [0.0], 1, "1f1b", interleave=2).makespan_s == 11


def test_blocking_sends_occupy_the_receiver() -> None:
    """Stage 1 receives 0.5 before each forward, which it otherwise does while it computes; stage 0 likewise."""
    free = simulate([StageTimes(1, 1, 0)] * 2, [0.5], 3, "gpipe")
    blocking = simulate([StageTimes(1, 1, 0)] * 2, [0.5], 3, "gpipe", blocking_sends=True)
    assert [i.start_s for i in free.stages[1]] == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert [i.start_s for i in blocking.stages[1]] == [1.5, 3, 4.5, 5.5, 6.5, 7.5, 8.5]
    assert [i.start_s for i in blocking.stages[0]] == [0, 1, 2, 7, 8.5, 10, 11]
    assert (free.makespan_s, blocking.makespan_s) == (9, 11)


def test_actions_of_zero_bubble_follow_the_textbook() -> None:
    """ZB-H1 of Qi et al. 2024: the last rank puts off as many W as ranks lie before it."""
    orders = [" ".join(map(str, schedule_actions(k, 3, 4, "zero-bubble"))) for k in range(3)]
    assert orders == [
        "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3 STEP",
        "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3 STEP",
        "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3 STEP",
    ]


@given(ranks=st.integers(2, 6), rounds=st.integers(1, 4))
def test_equal_parts_leave_a_third_of_the_bubble(ranks: int, rounds: int) -> None:
    """With F = B = W the bubble is (K - 1) (F + B - W), against (K - 1) (F + B + W) under 1F1B (Qi et al. 2024)."""
    times, count = [StageTimes(1.0, 2.0, 0.5, weight_s=1.0)] * ranks, ranks * rounds
    timeline = simulate(times, [0.0] * (ranks - 1), count, "zero-bubble")
    assert timeline.makespan_s == pytest.approx(3.0 * count + (ranks - 1) + 0.5)
    assert all(timeline.busy_s(k) == pytest.approx(3.0 * count + 0.5) for k in range(ranks))
    plain = simulate(times, [0.0] * (ranks - 1), count, "1f1b")
    assert plain.makespan_s == pytest.approx(3.0 * count + 3.0 * (ranks - 1) + 0.5)


@given(
    data=st.data(), ranks=st.integers(2, 5), rounds=st.integers(1, 3), chunks=st.integers(1, 3)
)  # fmt: skip
def test_zero_bubble_is_a_longest_path(data: st.DataObject, ranks: int, rounds: int, chunks: int) -> None:
    """F and B wait for their neighbours, W for nothing but its turn; the step ends with the last W."""
    last, count = ranks * chunks - 1, ranks * rounds
    drawn = st.tuples(SECONDS, SECONDS, SECONDS, SECONDS)
    parts = data.draw(st.lists(drawn, min_size=last + 1, max_size=last + 1))
    sends = data.draw(st.lists(SECONDS, min_size=last, max_size=last))
    times = [StageTimes(f, b + w, g, weight_s=w) for f, b, w, g in parts]
    timeline = simulate(times, sends, count, "zero-bubble", interleave=chunks)
    stops = {
        (i.action.kind, i.action.microbatch, i.action.chunk * ranks + k): i.stop_s
        for k, rank in enumerate(timeline.stages)
        for i in rank[:-1]
    }
    assert len(stops) == 3 * count * (last + 1)
    for k, rank in enumerate(timeline.stages):
        before = 0.0
        for interval in rank[:-1]:
            kind, m, c = interval.action.kind, interval.action.microbatch, interval.action.chunk * ranks + k
            source = {"F": c - 1, "B": c + 1}.get(kind, -1)
            made = stops.get((kind, m, source))
            start = before if made is None else max(before, made + sends[min(c, source)])
            length = parts[c]["FBW".index(kind)]
            assert (interval.start_s, interval.stop_s) == pytest.approx((start, start + length))
            assert kind != "W" or stops["B", m, c] <= interval.start_s
            before = interval.stop_s
        assert rank[-1].stop_s == pytest.approx(before + sum(part[3] for part in parts[k::ranks]))


def test_what_waits_for_its_weights_turn_is_held() -> None:
    """Of 10 per microbatch B leaves 4: rank 2 of 3 holds two of those when F2 comes, and a third before W0."""
    actions = schedule_actions(2, 3, 4, "zero-bubble")
    assert most_held(actions, [10.0], [4.0]) == 10 + 2 * 4
    assert most_held(actions, [10.0], [11.0]) == 3 * 11
    assert most_held(schedule_actions(0, 3, 4, "zero-bubble"), [10.0], [4.0]) == 30


@pytest.mark.parametrize(
    ("ranks", "count", "schedule", "chunks", "words"),
    [
        (3, 2, "zero-bubble", 1, "at least as many microbatches, in equal rounds: a multiple of 3, not 2"),
        (3, 16, "zero-bubble", 1, "a multiple of 3, not 16"),
        (2, 3, "zero-bubble", 2, "zero-bubble schedule needs microbatches in multiples of the 2 ranks, not 3"),
        (2, 3, "1f1b", 2, "multiples of the 2 ranks, not 3"),
        (2, 4, "gpipe", 2, "need schedule '1f1b'"),
        (2, 4, "1f1b", 0, "at least one chunk"),
        (2, 4, "zigzag", 1, "unknown schedule"),
    ],
)
def test_what_cannot_run_is_refused(ranks: int, count: int, schedule: str, chunks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schedule_actions(0, ranks, count, schedule, interleave=chunks)


def test_chunks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 chunks do not divide into ranks of 2"):
        simulate([StageTimes(1, 1, 0)] * 3, [0.0] * 2, 2, "1f1b", interleave=2)
