"""Pages: complete, well-formed, alone, harmless, the same for the same plan, and true to the timeline they draw."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.solution import Alternative, StageChoice
from autopar.ir.streams import PASSES, BlockWork, Overlap, stage_times, stream_intervals
from autopar.ir.timeline import FORWARD, Action, Interval, simulate
from autopar.report.page import plan_page
from autopar.report.page_curves import frontier_page, sweep_page
from autopar.report.page_detail import EXPOSED, MERGED, MOST_MARKS, StepDetail, schedule_marks
from autopar.report.page_html import POLICY
from autopar.report.page_style import STYLE
from autopar.report.sharding import BlockSplit
from autopar.units import format_bytes, format_joules, format_seconds, format_watts
from tests.planner.plans import plans, tiny_plan
from tests.report.pages import read

SHOW: dict[str, Callable[[float], str]] = {
    "s": format_seconds, "J": format_joules, "W": format_watts, "B": format_bytes,
}  # fmt: skip
HOSTILE = """"'><script>alert(1)</script><img src=x onerror=alert(2)></style></title><!-- &lt; ]]> http://a.b/"""
BLOCKS = (BlockWork(1, 2, 0.5, 0.5, 0.75, 3, 0.25), BlockWork(2, 4, 0.5, 0.5, 0.75, 1, 0.25))


OVERLAP = Overlap(prefetch=True, gradients=True, slowdown=0.25)


def detail_of(plan: Plan, blocks: Sequence[BlockWork] = BLOCKS) -> StepDetail:
    """Every stage of the plan runs `blocks`."""
    ranks, chunks = plan.decisions.num_ranks, len(plan.decisions.stages)
    timeline = simulate(
        [stage_times(blocks, OVERLAP)] * chunks, [0.25] * (chunks - 1), plan.decisions.num_microbatches,
        plan.decisions.schedule, interleave=plan.decisions.interleave,
    )  # fmt: skip
    passes = {name: stream_intervals(blocks, OVERLAP, name) for name in PASSES}
    held = tuple(((0.0, 2.0**30), (1.0, 2.0**31), (2.0, 2.0**30)) for _ in range(ranks))
    splits = (BlockSplit("h.0 .. h.3 (4 blocks)", (("dp batch", "attn, mlp"), ("tp columns", "fc"))),)
    return StepDetail(timeline, (passes,) * chunks, held, tuple(float(k + 1) for k in range(chunks)), splits)


def staged(num_stages: int, num_microbatches: int) -> Plan:
    """`tiny_plan` with more of both."""
    plan = tiny_plan()
    decisions = replace(
        plan.decisions,
        num_microbatches=num_microbatches,
        stages=tuple(StageChoice(k, k + 1, "full") for k in range(num_stages)),
    )
    predicted = replace(
        plan.predicted,
        stages=plan.predicted.stages[:1] * num_stages,
        peak_memory_bytes=plan.predicted.peak_memory_bytes[:1] * num_stages,
    )
    model = replace(plan.model, batch_size=2 * num_microbatches)
    return replace(plan, decisions=decisions, predicted=predicted, model=model)


def quantities(plan: Plan) -> Iterator[Quantity]:
    own = plan.predicted
    yield from (own.step_time_s, own.energy_j, own.average_power_w, own.peak_power_w, *own.peak_memory_bytes)
    for stage in own.stages:
        yield from (stage.forward_s, stage.backward_s, stage.step_s)


def check_figures(plan: Plan, text: str) -> None:
    """Every predicted figure stands there with its range and label."""
    for quantity in quantities(plan):
        show = SHOW[quantity.unit]
        assert show(quantity.value) in text
        assert quantity.label in text
        assert quantity.low == quantity.high or f"{show(quantity.low)} to {show(quantity.high)}" in text
    assert format_joules(plan.predicted.tdp_energy_j) in text
    assert all(format_joules(size) in text for size in plan.predicted.energy_by_cause.values())
    for stage in plan.predicted.stages:
        assert all(format_bytes(size) in text for size in stage.memory_by_cause.values() if size > 0)
    assert all(str(count) in text for count in plan.predicted.sources.values())


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_page_of_any_plan_is_well_formed_and_holds_every_figure(plan: Plan) -> None:
    page = plan_page(plan)
    check_figures(plan, read(page).text)
    assert page.encode() == plan_page(plan).encode()


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (8, 1)])
def test_with_the_simulated_step_too(shape: tuple[int, int]) -> None:
    plan = staged(*shape)
    found = read(plan_page(plan, detail_of(plan)))
    check_figures(plan, found.text)
    for words in ("Timeline of one step", "Both streams", "Memory over the step", "tp columns", EXPOSED):
        assert words in found.text
    assert all(own.get("aria-label") or own.get("aria-hidden") == "true" for own in found.all("svg"))


def test_a_plan_of_one_gpu_has_neither_other_ranks_nor_splits() -> None:
    plan = staged(1, 1)
    one = replace(plan, decisions=replace(plan.decisions, mesh=replace(plan.decisions.mesh, axes=())))
    assert one.decisions.num_gpus == 1
    text = read(plan_page(one, detail_of(one))).text
    assert "How the heavy ops are split" not in text
    assert "no parallelism" in text


def test_a_page_refers_to_nothing_outside_and_runs_nothing() -> None:
    plan = tiny_plan()
    page = plan_page(plan, detail_of(plan))
    for words in ("http:", "https:", "//", "src=", "href", "url(", "@import", "<script", "<link", "<iframe"):
        assert words not in page
    names = {name for _, own in read(page).elements for name in own}
    assert not {name for name in names if name.startswith("on")}
    policies = [own for own in read(page).all("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert [own["content"] for own in policies] == [POLICY]
    assert not set("<&") & set(STYLE)


def test_data_goes_in_as_text() -> None:
    plan = tiny_plan()
    quiet, hostile = (_filled(plan, words) for words in ("quiet", HOSTILE))
    pages = [plan_page(own, _filled_detail(own, words)) for own, words in ((quiet, "quiet"), (hostile, HOSTILE))]
    expected, found = map(read, pages)
    assert found.tags() == expected.tags()
    assert [sorted(own) for _, own in found.elements] == [sorted(own) for _, own in expected.elements]
    assert found.text.count("alert(1)") == expected.text.count("quiet") >= 15
    assert "<script" not in pages[1]
    assert "<img" not in pages[1]


def _filled(plan: Plan, words: str) -> Plan:
    """With `words` wherever a plan has text that no check restricts."""
    stage = replace(plan.predicted.stages[0], memory_by_cause={words: 5.0})
    baseline = replace(plan.baselines[0], name=words, description=words, reason=words) if plan.baselines else None
    return replace(
        plan,
        model=replace(plan.model, source=words, options={words: words}, graph_hash=words),
        cluster=replace(plan.cluster, gpu=words, input_hash=words),
        predicted=replace(
            plan.predicted,
            stages=(stage,) * len(plan.predicted.stages),
            energy_by_cause={words: 1.0},
            sources={words: 1},
        ),
        solver=replace(plan.solver, status=words, name=words),
        rule_free_ops={words: 1},
        baselines=(baseline,) if baseline is not None else (),
        alternatives=(Alternative(words, 1.0, 1.0, 1.0, 1.0, words), Alternative(words, None, None, None, None, words)),
        notes=(words,),
        created={words: words},
        software=replace(plan.software, name=words),
    )


def _filled_detail(plan: Plan, words: str) -> StepDetail:
    return replace(detail_of(plan), splits=(BlockSplit(words, ((words, words),)),))


def test_text_that_no_file_can_hold_is_replaced() -> None:
    plan = replace(tiny_plan(), notes=("a\ud800b\x00c\x1bd\u202ee",))
    page = plan_page(plan, missing="lost \udfff")
    assert "a\ufffdb\ufffdc\ufffdd\ufffde" in page
    assert page.encode("utf-8").decode("utf-8") == page


def test_only_the_footer_tells_when_a_plan_was_made() -> None:
    first, second = (replace(tiny_plan(), created={"date": date}) for date in ("2026-01-01", "2026-01-02"))
    pages = [plan_page(plan, detail_of(plan)) for plan in (first, second)]
    assert pages[0] != pages[1]
    bare = [re.sub(r"<footer.*</footer>", "", page) for page in pages]
    assert bare[0] == bare[1]


def test_a_page_without_the_step_says_why() -> None:
    text = read(plan_page(tiny_plan(), missing="the model is gone")).text
    assert "Not drawn: the model is gone." in text
    assert "Both streams" not in text


def test_a_long_pipeline_stays_small_and_says_what_is_left_out() -> None:
    plan = staged(64, 256)
    blocks = [BlockWork(1, 2, 0.5, 0.5, 0.75, 3, 0.25)] * 8
    page = plan_page(plan, detail_of(plan, blocks))
    assert len(page.encode()) < 2_000_000
    found = read(page)
    assert len(found.all("rect")) < 4 * MOST_MARKS
    assert "Drawn are 32 of 64 ranks" in found.text
    assert "are not drawn one by one" in found.text
    assert "are too many to draw" in found.text
    check_figures(plan, found.text)


def _share(attributes: dict[str, Any], name: str) -> float:
    return float(attributes[name].removesuffix("%")) / 100


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 8)])
def test_the_timeline_draws_each_action_where_it_is(shape: tuple[int, int]) -> None:
    plan = staged(*shape)
    detail = detail_of(plan)
    page = plan_page(plan, detail)
    part = page[page.index("Timeline of one step") : page.index("Both streams")]
    strips = re.findall(r'<svg height="24" role="img".*?</svg>', part)
    assert len(strips) == shape[0]
    for strip, intervals in zip(strips, detail.timeline.stages, strict=True):
        marks = [own for own in read(strip).all("rect") if own["class"] in ("k0", "k1", "k2")]
        assert sorted((_share(own, "x"), _share(own, "width")) for own in marks) == [
            pytest.approx((i.start_s / detail.timeline.makespan_s, (i.stop_s - i.start_s) / detail.timeline.makespan_s),
                          abs=2e-5)
            for i in intervals
        ]  # fmt: skip


def test_what_is_drawn_as_one_block_is_as_high_as_its_share_of_the_time() -> None:
    """One second of work every four: from the start of the first of 81 to the stop of the last, 321 s."""
    intervals = [Interval(Action(FORWARD, m), 4.0 * m, 4.0 * m + 1.0) for m in range(100)]
    marks, num_merged = schedule_marks(intervals, 20, 0.5)
    assert (len(marks), num_merged) == (20, 81)
    block = next(mark for mark in marks if mark.colour == MERGED)
    assert (block.start, block.stop, block.bottom) == (36.0, 357.0, 0.5)
    assert block.bottom - block.top == pytest.approx(0.5 * 81 / 321)
    assert "81 forwards and 0 backwards" in block.title


def test_times_by_cause_add_up_to_the_busy_time() -> None:
    plan = staged(3, 4)
    detail = detail_of(plan)
    for rank in range(3):
        times = detail.times_s(rank)
        assert sum(times.values()) == pytest.approx(detail.timeline.busy_s(rank))
        # Alone on its stream, and slowed by what runs beside it, a block computes at least 1 + 2 seconds forward.
        assert 4 * 3 <= times["forward"] < 4 * 4
        assert times[EXPOSED] >= 4 * (0.5 + 0.5 + 0.75)


def test_frontier_and_sweep_pages_hold_each_plan() -> None:
    fast, slow = staged(2, 2), staged(1, 4)
    time_s = replace(slow.predicted.step_time_s, value=0.0101)
    energy_j = replace(slow.predicted.energy_j, value=slow.predicted.energy_j.low)
    slow = replace(slow, predicted=replace(slow.predicted, step_time_s=time_s, energy_j=energy_j))
    many = [frontier_page((fast, slow), 3, False, HOSTILE), sweep_page((slow, fast), [(7, HOSTILE)], "m")]
    for page in many:
        found = read(page)
        assert "script" not in found.tags()
        assert len(found.all("circle")) in (2, 4)
        for plan in (fast, slow):
            own = plan.predicted
            for quantity in (own.step_time_s, own.energy_j, own.average_power_w, own.peak_power_w):
                assert SHOW[quantity.unit](quantity.value) in found.text
    assert "3 were left out" in many[0]
    assert "alert(1)" in read(many[1]).text


@pytest.mark.parametrize("count", [0, 1])
def test_curves_of_few_plans(count: int) -> None:
    own = (tiny_plan(),) * count
    assert len(read(frontier_page(own, 0, True, "m")).all("circle")) == count
    assert len(read(sweep_page(own, [(3, "why")], "m")).all("circle")) == 2 * count


def test_a_timeline_of_no_length_is_drawn() -> None:
    plan = staged(1, 1)
    detail = detail_of(plan, [BlockWork(0, 0)])
    assert detail.timeline.makespan_s == 0
    assert "Timeline of one step" in read(plan_page(plan, detail)).text
