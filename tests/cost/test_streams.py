"""Streams of a stage against an oracle that moves both streams from event to event, and its properties."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from autopar.ir.streams import PASSES, BlockWork, Overlap, Streams, stage_times, stream_intervals
from autopar.ir.timeline import StageTimes, simulate

FIELDS = tuple(f.name for f in fields(BlockWork) if f.name not in ("weight_s", "out_s", "back_s"))
SECONDS = st.one_of(st.just(0.0), st.integers(1, 40).map(lambda n: n / 4))
BLOCKS = st.lists(st.builds(BlockWork, **dict.fromkeys(FIELDS, SECONDS)), min_size=1, max_size=6)
SPLIT_BLOCKS = st.lists(
    st.builds(BlockWork, weight_s=SECONDS, **dict.fromkeys(FIELDS, SECONDS)), min_size=1, max_size=6
)
OVERLAPS = st.builds(Overlap, st.booleans(), st.booleans(), st.sampled_from((0.0, 0.125, 0.25, 0.5, 0.875, 1.0)))
Name = tuple[str, int]


def programme(blocks: Sequence[BlockWork], overlap: Overlap, phase: str) -> Iterator[tuple[str, Name, float]]:
    """What the host issues: ("send", name, seconds), ("wait", name, 0) or ("compute", name, seconds)."""
    forward = phase == "forward"
    if phase == "weight":
        yield from (("compute", ("c", i), blocks[i].weight_s) for i in reversed(range(len(blocks))))
        return
    order = list(range(len(blocks)))[:: 1 if forward else -1]
    gathers = {i: blocks[i].gather_s if forward else blocks[i].regather_s for i in order}
    if overlap.prefetch:
        yield "send", ("g", order[0]), gathers[order[0]]
    for place, i in enumerate(order):
        if not overlap.prefetch:
            yield "send", ("g", i), gathers[i]
        yield "wait", ("g", i), 0
        if overlap.prefetch and place + 1 < len(order):
            after = order[place + 1]
            yield "send", ("g", after), gathers[after]
        yield "compute", ("c", i), blocks[i].forward_s if forward else blocks[i].backward_s
        if forward:
            continue
        yield "send", ("s", i), blocks[i].scatter_s
        if not overlap.prefetch:
            yield "wait", ("s", i), 0
        if phase == "last_backward" and overlap.gradients:
            yield "send", ("y", i), blocks[i].sync_s


def oracle(blocks: Sequence[BlockWork], overlap: Overlap, phase: str) -> tuple[Fraction, Fraction]:
    """(when all but synchronisation is done, when all is), by moving from one completion to the next."""
    todo = deque(programme(blocks, overlap, phase))
    speed, now, needed = 1 - Fraction(overlap.slowdown), Fraction(0), Fraction(0)
    link: deque[tuple[Name, Fraction]] = deque()
    pending: set[Name] = set()
    left: Fraction | None = None
    while todo or link or left is not None:
        while todo and left is None:
            kind, name, seconds = todo[0]
            if kind == "wait" and name in pending:
                break
            todo.popleft()
            if kind == "send" and seconds:
                link.append((name, Fraction(seconds)))
                pending.add(name)
            elif kind == "compute" and seconds:
                left = Fraction(seconds)
        rate = speed if link else Fraction(1)
        events = [link[0][1]] if link else []
        if left is not None and rate:
            events.append(left / rate)
        if not events:
            break
        step = min(events)
        now += step
        if left is not None:
            left -= step * rate
            if left == 0:
                left, needed = None, now
        if link:
            name, sending = link.popleft()
            if sending > step:
                link.appendleft((name, sending - step))
            else:
                pending.remove(name)
                needed = now if name[0] != "y" else needed
    return needed, now


def total_s(times: StageTimes) -> float:
    """Of a last backward with what follows it."""
    return (times.backward_s if times.last_backward_s is None else times.last_backward_s) + times.step_s


def sums(blocks: Sequence[BlockWork]) -> dict[str, float]:
    return {name: sum(getattr(block, name) for block in blocks) for name in FIELDS}


@given(
    blocks=SPLIT_BLOCKS, overlap=OVERLAPS.filter(lambda overlap: not overlap.gradients), phase=st.sampled_from(PASSES)
)
def test_a_split_pass_takes_what_the_oracle_says(blocks: list[BlockWork], overlap: Overlap, phase: str) -> None:
    _, stop = oracle(blocks, overlap, phase)
    assert stream_intervals(blocks, overlap, phase).stop_s == pytest.approx(float(stop))


@given(blocks=SPLIT_BLOCKS, overlap=OVERLAPS)
def test_the_halves_of_a_split_backward_add_up_and_its_synchronisation_shows(
    blocks: list[BlockWork], overlap: Overlap
) -> None:
    times, whole = stage_times(blocks, overlap), sums(blocks)
    assert times.weight_s == whole_weight(blocks)
    assert times.backward_s == pytest.approx(float(oracle(blocks, overlap, "backward")[1]) + times.weight_s)
    if times.weight_s:
        assert (times.last_backward_s, times.exposed_s) == (None, 0.0)
        assert times.step_s == whole["sync_s"] + whole["update_s"]
        last = stream_intervals(blocks, overlap, "last_backward")
        assert last == stream_intervals(blocks, overlap, "backward")


def whole_weight(blocks: Sequence[BlockWork]) -> float:
    return sum(block.weight_s for block in blocks)


@given(blocks=BLOCKS, overlap=OVERLAPS, phase=st.sampled_from(PASSES))
def test_a_pass_takes_what_the_oracle_says(blocks: list[BlockWork], overlap: Overlap, phase: str) -> None:
    needed, stop = oracle(blocks, overlap, phase)
    found = stream_intervals(blocks, overlap, phase)
    assert (found.needed_s, found.stop_s) == pytest.approx((float(needed), float(stop)))


@given(blocks=BLOCKS, overlap=OVERLAPS)
def test_stage_times_are_those_of_the_passes(blocks: list[BlockWork], overlap: Overlap) -> None:
    times, whole = stage_times(blocks, overlap), sums(blocks)
    assert times.forward_s == pytest.approx(float(oracle(blocks, overlap, "forward")[1]))
    assert times.backward_s == pytest.approx(float(oracle(blocks, overlap, "backward")[1]))
    needed, stop = oracle(blocks, overlap, "last_backward")
    if overlap.gradients:
        assert times.last_backward_s == pytest.approx(float(needed))
        assert times.step_s == pytest.approx(float(stop - needed) + whole["update_s"], abs=1e-9)
    else:
        assert times.last_backward_s is None
        assert times.step_s == whole["sync_s"] + whole["update_s"]


@given(blocks=BLOCKS, overlap=OVERLAPS)
def test_time_lies_between_the_longer_stream_and_both_in_turn(blocks: list[BlockWork], overlap: Overlap) -> None:
    times, whole = stage_times(blocks, overlap), sums(blocks)
    moved = whole["regather_s"] + whole["scatter_s"]
    for took, computed, sent in (
        (times.forward_s, whole["forward_s"], whole["gather_s"]),
        (times.backward_s, whole["backward_s"], moved),
        (total_s(times) - whole["update_s"], whole["backward_s"], moved + whole["sync_s"]),
    ):
        assert max(computed, sent) - 1e-9 <= took <= computed + sent + 1e-9


@given(
    blocks=BLOCKS,
    overlap=OVERLAPS,
    where=st.tuples(st.integers(0, 5), st.sampled_from(FIELDS)),
    more=SECONDS,
    slower=SECONDS,
)
def test_nothing_gets_faster_when_an_input_grows(
    blocks: list[BlockWork], overlap: Overlap, where: tuple[int, str], more: float, slower: float
) -> None:
    at, name = where[0] % len(blocks), where[1]
    grown = [*blocks[:at], replace(blocks[at], **{name: getattr(blocks[at], name) + more}), *blocks[at + 1 :]]
    before = stage_times(blocks, overlap)
    dragged = replace(overlap, slowdown=min(1.0, overlap.slowdown + slower / 10))
    for after in (stage_times(grown, overlap), stage_times(blocks, dragged)):
        assert after.forward_s >= before.forward_s - 1e-9
        assert after.backward_s >= before.backward_s - 1e-9
        assert (after.last_backward_s or 0) >= (before.last_backward_s or 0) - 1e-9
        assert total_s(after) >= total_s(before) - 1e-9


@given(blocks=BLOCKS, slowdown=st.sampled_from((0.0, 0.25, 0.75, 1.0)), gradients=st.booleans())
def test_hiding_is_never_slower(blocks: list[BlockWork], slowdown: float, gradients: bool) -> None:
    hidden = stage_times(blocks, Overlap(prefetch=True, gradients=gradients, slowdown=slowdown))
    shown = stage_times(blocks, Overlap(prefetch=False, gradients=gradients, slowdown=slowdown))
    neither = stage_times(blocks, Overlap(prefetch=False, gradients=False, slowdown=slowdown))
    assert hidden.forward_s <= shown.forward_s + 1e-9
    assert hidden.backward_s <= shown.backward_s + 1e-9
    assert total_s(hidden) <= total_s(shown) + 1e-9
    assert total_s(shown) <= total_s(neither) + 1e-9


@given(blocks=st.lists(st.builds(BlockWork, **dict.fromkeys(FIELDS, st.floats(0, 9))), min_size=1, max_size=9))
@example([BlockWork(0.1, 0.2, 0.0, 0.0, 0.0, 0.3, 0.4)] * 7)
def test_with_nothing_to_hide_times_are_the_plain_sums(blocks: list[BlockWork]) -> None:
    """To the last bit: figures made before there were streams stay as they were."""
    still = [replace(b, gather_s=0.0, regather_s=0.0, scatter_s=0.0) for b in blocks]
    whole = sums(still)
    for overlap in (Overlap(), Overlap(prefetch=True, slowdown=0.5), Overlap(gradients=True)):
        times = stage_times(still, overlap)
        assert (times.forward_s, times.backward_s) == (whole["forward_s"], whole["backward_s"])
        if not overlap.gradients:
            assert times.step_s == whole["sync_s"] + whole["update_s"]
    quiet = [replace(b, sync_s=0.0) for b in still]
    assert stage_times(quiet, Overlap(gradients=True)).last_backward_s == whole["backward_s"]


def spans_of(streams: Streams) -> list[str]:
    rows = (streams.computation, streams.communication)
    return [" ".join(f"{s.kind}{s.block}:{s.start_s:g}-{s.stop_s:g}" for s in row) for row in rows]


def test_forward_matches_the_hand_worked_grid() -> None:
    """Gathers of 2 beside computation of 4 at half speed: 1 second goes by beside them, 3 alone."""
    blocks = [BlockWork(4, 8, gather_s=2)] * 3
    assert spans_of(stream_intervals(blocks, Overlap(True, False, 0.5), "forward")) == [
        "forward0:2-7 forward1:7-12 forward2:12-16",
        "gather0:0-2 gather1:2-4 gather2:7-9",
    ]


def test_last_backward_matches_the_hand_worked_grid() -> None:
    """The gather of block 0 waits behind the scatter and the synchronisation of block 2, and block 0 for it."""
    blocks = [BlockWork(1, 2, regather_s=1, scatter_s=1, sync_s=3)] * 3
    found = stream_intervals(blocks, Overlap(True, True, 0.0), "last_backward")
    assert spans_of(found) == [
        "backward2:1-3 backward1:3-5 backward0:8-10",
        "regather2:0-1 regather1:1-2 scatter2:3-4 sync2:4-7 regather0:7-8 scatter1:8-9 sync1:9-12 scatter0:12-13"
        " sync0:13-16",
    ]
    assert (found.needed_s, found.stop_s) == (13, 16)


@pytest.mark.parametrize("slowdown", [0.0, 0.2, 1.0])
def test_a_collective_hidden_whole_costs_the_slowdown(slowdown: float) -> None:
    """Five of six gathers of 1 hide behind blocks of 10, the first does not."""
    times = stage_times([BlockWork(10, 20, gather_s=1)] * 6, Overlap(True, False, slowdown))
    assert times.forward_s == pytest.approx(60 + 1 + 5 * slowdown)


@given(blocks=BLOCKS, overlap=OVERLAPS, microbatches=st.integers(1, 4))
def test_a_step_of_one_stage_is_its_passes_in_turn(
    blocks: list[BlockWork], overlap: Overlap, microbatches: int
) -> None:
    times = stage_times(blocks, overlap)
    assume(times.forward_s + times.backward_s > 0)
    before = (microbatches - 1) * times.backward_s + microbatches * times.forward_s
    assert simulate([times], [], microbatches, "1f1b").makespan_s == pytest.approx(before + total_s(times))


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slowdown 1\.5"):
        Overlap(True, True, 1.5)
    with pytest.raises(ValueError, match="unknown pass 'sideways'"):
        stream_intervals([BlockWork(1, 1)], Overlap(), "sideways")
