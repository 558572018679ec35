"""Traces against the timeline they are made from, and the command that writes one."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from autopar.ir.streams import PASSES, BlockWork, Overlap, stage_times, stream_intervals
from autopar.ir.timeline import simulate
from autopar.report.trace import trace_json
from tests.cli.helpers import Cli

BLOCKS = [BlockWork(1, 2, 0.5, 0.5, 0.75, 3, 0.25), BlockWork(2, 4, 0.5, 0.5, 0.75, 1, 0.25)]


def traced(overlap: Overlap, interleave: int = 1) -> tuple[dict[str, Any], float]:
    """Two ranks, four microbatches; and the makespan."""
    chunks = 2 * interleave
    timeline = simulate(
        [stage_times(BLOCKS, overlap)] * chunks, [0.25] * (chunks - 1), 4, "1f1b", interleave=interleave
    )
    passes = {name: stream_intervals(BLOCKS, overlap, name) for name in PASSES}
    return trace_json(timeline, [passes] * chunks), timeline.makespan_s


def rows(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault((event["pid"], event["tid"]), []).append(event)
    return found


@pytest.mark.parametrize("overlap", [Overlap(), Overlap(True, True, 0.25), Overlap(True, False, 0.5)])
def test_rows_hold_one_thing_at_a_time_and_all_of_it(overlap: Overlap) -> None:
    trace, makespan_s = traced(overlap)
    by_row = rows(trace)
    assert set(by_row) == {(rank, row) for rank in range(2) for row in range(3)}
    for events in by_row.values():
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(sorted(events, key=lambda e: e["ts"])))
        assert max(e["ts"] + e["dur"] for e in events) <= makespan_s * 1e6 + 1e-3
    for rank in range(2):
        actions = {e["name"]: e for e in by_row[rank, 0]}
        assert len(actions) == len(by_row[rank, 0]) == 9
        for event in by_row[rank, 1]:
            action = actions[event["args"]["action"]]
            assert action["ts"] - 1e-3 <= event["ts"]
            assert event["ts"] + event["dur"] <= action["ts"] + action["dur"] + 1e-3
        sent = {kind: sum(e["dur"] for e in by_row[rank, 2] if e["name"].startswith(kind)) for kind in ("g", "r", "sc")}
        assert sent == pytest.approx({"g": 4e6, "r": 4e6, "sc": 6e6})
        synchronised = sum(e["dur"] for e in by_row[rank, 2] if e["name"].startswith("sync"))
        assert synchronised == pytest.approx(4e6 if overlap.gradients else 0)


def test_chunks_are_named_and_ranks_labelled() -> None:
    trace, _ = traced(Overlap(), interleave=2)
    assert [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"] == ["stage 0", "stage 1"]
    assert {"F0", "F0.1", "B3.1", "STEP"} <= {e["name"] for e in trace["traceEvents"]}


def test_explain_writes_the_trace_of_the_predicted_step(cli: Cli) -> None:
    cli("plan", "model.py", "--gpus", "2", "--pin", "pp=2,dp=1,tp=1,m=4", "--out", "plan.json")
    content = json.loads((cli.directory / "plan.json").read_text())
    assert "Time" in cli("explain", "plan.json", "--trace", "trace.json").out
    trace = json.loads((cli.directory / "trace.json").read_text())
    stop = max(e["ts"] + e["dur"] for e in trace["traceEvents"] if e["ph"] == "X")
    assert stop == pytest.approx(content["predicted"]["step_time_s"]["value"] * 1e6)
    assert {e["pid"] for e in trace["traceEvents"]} == {0, 1}


def test_a_trace_needs_the_model_of_the_plan_and_a_place(cli: Cli) -> None:
    cli("plan", "model.py", "--gpus", "1", "--out", "plan.json")
    assert cli("explain", "plan.json", "--trace", "nowhere/trace.json").code == 2
    model = (cli.directory / "model.py").read_text()
    cli.write("model.py", model.replace("width: int = 8", "width: int = 12"))
    changed = cli("explain", "plan.json", "--trace", "trace.json")
    assert (changed.code, "has changed since the plan was made" in changed.err) == (2, True)
