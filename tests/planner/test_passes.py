"""Where a plan switches from data to tensor parallelism, what can run in passes from there, and what that costs."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.cli.pins import parse_pins
from autopar.errors import InputError, PlanMismatchError
from autopar.ir.passes import Passes, cut_runs, samples_of
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.streams import pass_intervals
from autopar.ir.verify import verify
from autopar.planner.execute import prepare
from autopar.planner.plan import plan_model
from autopar.planner.request import PlanRequest
from autopar.planner.timeline import make_detail
from autopar.program.collectives import AxisGroup
from autopar.report.diff import diff_report
from autopar.report.page_detail import streams_section
from autopar.report.text import plan_report
from autopar.rewrite.passes import build_in_passes

ALEXNET = str(Path(__file__).resolve().parents[2] / "examples" / "alexnet.py")


@functools.cache
def alexnet(pins: str, num_gpus: int = 8, gpu: str = "k20", **options: str) -> Plan:
    request = PlanRequest(num_gpus, gpu=gpu, use_all=True, pins=parse_pins(pins).pins, with_baselines=False)
    return plan_model(ALEXNET, options, request)


@pytest.mark.parametrize("order", ["turns", "shares"])
def test_passes_have_every_sample_once_and_each_rank_sends_as_many(order: str) -> None:
    passes = Passes(1, "dp", 4, order)
    runs = [samples_of(passes, i, samples=48, ranks=4, outer=3) for i in range(4)]
    rows = [[first + i for first, count in own for i in range(count)] for own in runs]
    assert sorted(row for own in rows for row in own) == list(range(48))
    assert {len(own) for own in rows} == {12}
    owners = [{row % 16 // 4 for row in own} for own in rows]
    assert owners == ([{0}, {1}, {2}, {3}] if order == "turns" else [{0, 1, 2, 3}] * 4)
    assert cut_runs(runs[0], 4, 4) == tuple((first, count) for first, count in runs[0] if 16 <= first < 32)


def test_sends_hide_behind_passes_but_the_first_and_the_last_return() -> None:
    """Closed form without slowdown: with passes longer than what runs beside them, all but both ends is hidden."""
    streams = pass_intervals(1.0, 0.3, 0.2, 4, 0.0)
    assert streams.stop_s == pytest.approx(0.3 + 4 * 1.0 + 0.2)
    assert pass_intervals(1.0, 0.3, 0.2, 4, 1.0).stop_s == pytest.approx(4 * 1.5)
    bound = pass_intervals(0.1, 1.0, 1.0, 4, 0.0)
    assert bound.stop_s == pytest.approx(8 * 1.0), "a link that is always busy"


def test_the_schemes_of_the_paper_on_its_devices() -> None:
    a, b, c, paper = (alexnet(f"pp=1,m=1,owt={scheme}", width="64") for scheme in ("a", "b", "c", "c,passes=8"))
    counts = [p.decisions.passes and (p.decisions.passes.order, p.decisions.passes.count) for p in (a, b, c, paper)]
    assert counts == [None, ("turns", 8), ("shares", 4), ("shares", 8)]
    times = [plan.predicted.step_time_s.value for plan in (c, a, b)]
    assert times == sorted(times)
    held = [plan.predicted.stages[0].memory_by_cause["activations"] for plan in (paper, c, a)]
    assert held == sorted(held), "smaller passes hold less"
    each = alexnet("pp=1,m=1,owt=c,passes=4,fc_update=pass", width="64")
    assert each.predicted.energy_j.value > c.predicted.energy_j.value, "more updates move more bytes"


def test_a_plan_with_passes_is_written_read_checked_and_told() -> None:
    plan = alexnet("pp=1,m=1,owt=b", width="64")
    assert parse_plan(dump_plan(plan)) == plan
    text = plan_report(plan)
    assert "passes of" in text
    assert "in turn" in text
    assert max(map(len, text.splitlines())) <= 80
    (streams,) = (own["forward"] for own in make_detail(plan).passes)
    assert streams.stop_s == pytest.approx(plan.predicted.stages[0].forward_s.value)
    assert Counter(span.kind for span in (*streams.computation, *streams.communication)) == {
        "forward": 5, "pass": 8, "send": 8, "return": 8,
    }  # fmt: skip
    assert "send samples to a pass" in str(streams_section(make_detail(plan)))
    assert "Passes" in diff_report(alexnet("pp=1,m=1,owt=a", width="64"), plan, ("a", "b"))
    passes = plan.decisions.passes
    assert passes is not None
    for wrong in ({"order": "x"}, {"update": "x"}, {"block": 0}, {"axis": "pp"}, {"count": 3}, {"count": 1}):
        broken = replace(plan, decisions=replace(plan.decisions, passes=replace(passes, **wrong)))
        assert verify(broken), wrong
        with pytest.raises(PlanMismatchError, match="passes"):
            parse_plan(dump_plan(broken))


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ("pp=1,m=1,dp=2,tp=1,switch=shares", "passes need a switch from data to tensor parallelism"),
        ("pp=1,m=1,owt=c,passes=3", "do not divide into 3 passes"),
        ("pp=1,m=1,owt=b,passes=4", "in passes by turns each of the 2 ranks has one, not 4"),
    ],
)
def test_what_cannot_run_in_passes_is_refused_when_it_is_planned(pins: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        alexnet(pins, 2, "cpu", width="8", hidden="32", classes="8", image="64", batch="16")


def test_the_program_of_a_rank_sends_its_samples_into_a_program_of_one_pass() -> None:
    plan = alexnet(
        "pp=1,m=2,owt=c,passes=4", 2, "cpu", width="8", hidden="32", classes="8", image="64", batch="32", dropout="0.5"
    )
    ready = prepare(plan, "cpu")
    assert ready.behind is not None
    axes = (AxisGroup("dp", 2, 1),)
    program = build_in_passes(ready.captured.graph, ready.behind, plan.decisions, (1,), axes=axes)
    assert program.behind is not None
    (sent,), (received,) = program.sent, program.behind.program.received
    assert (sent.shape[0], received.shape[0]) == (16 // 2, 16 // 4), "this rank's samples, and a pass with all ranks'"
    assert program.behind.runs[3] == ((6, 2), (14, 2))
    assert [stream.samples for stream in program.streams] == [16, 4], "what a checkpoint sets back is both streams"
    assert {name for name in program.parameters if "features" in name} == set(program.parameters) - set(
        program.behind.program.parameters
    )


def test_a_number_of_devices_that_leaves_a_pinned_op_no_choice_is_passed_over() -> None:
    options = {"width": "8", "hidden": "32", "classes": "8", "image": "64", "batch": "16"}
    request = PlanRequest(3, gpu="cpu", pins=parse_pins("pp=1,m=1,owt=a").pins, with_baselines=False)
    assert plan_model(ALEXNET, options, request).decisions.num_gpus in (1, 2)
