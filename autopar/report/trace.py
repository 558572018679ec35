"""A timeline as JSON trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing draw.

Every rank is a process of three rows: its actions, and the blocks on its computation and its communication stream.
Times are microseconds. Format: "Trace Event Format" of the Chromium project, complete (`X`) and metadata (`M`) events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autopar.ir.streams import Span, Streams
from autopar.ir.timeline import BACKWARD, FORWARD, STEP, WEIGHT, Interval, Timeline

ROWS = ("schedule", "computation", "communication")
MICROSECOND = 1e-6


def trace_json(timeline: Timeline, passes: Sequence[Mapping[str, Streams]]) -> dict[str, Any]:
    """The whole trace.

    Args:
        timeline: of the ranks.
        passes: per stage (chunk, in the order of the model): both streams of each of `ir.streams.PASSES`.
    """
    events: list[dict[str, Any]] = []
    for rank, intervals in enumerate(timeline.stages):
        events.append(_label("process_name", rank, 0, f"stage {rank}"))
        events += [_label("thread_name", rank, row, name) for row, name in enumerate(ROWS)]
        last = max(i.action.microbatch for i in intervals)
        for interval in intervals:
            action = interval.action
            events.append(_event(str(action), rank, 0, interval.start_s, interval.stop_s))
            if action.kind != STEP:
                own = passes[action.chunk * len(timeline.stages) + rank]
                events += _blocks(interval, own[pass_of(action.kind, action.microbatch == last)], rank)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def pass_of(kind: str, is_last: bool) -> str:
    """Name of the pass, of `ir.streams.PASSES`, that an action is."""
    if kind in (FORWARD, WEIGHT):
        return "forward" if kind == FORWARD else "weight"
    return "last_backward" if kind == BACKWARD and is_last else "backward"


def _blocks(interval: Interval, streams: Streams, rank: int) -> Iterator[dict[str, Any]]:
    """What the blocks do on both streams during an action."""
    rows: tuple[Sequence[Span], ...] = (streams.computation, streams.communication)
    for row, spans in enumerate(rows, start=1):
        for span in spans:
            start, stop = interval.start_s + span.start_s, interval.start_s + span.stop_s
            event = _event(f"{span.kind} {span.block}", rank, row, start, stop)
            yield event | {"args": {"action": str(interval.action), "block": span.block}}


def _event(name: str, rank: int, row: int, start_s: float, stop_s: float) -> dict[str, Any]:
    start, length = start_s / MICROSECOND, (stop_s - start_s) / MICROSECOND
    return {"name": name, "cat": ROWS[row], "ph": "X", "ts": start, "dur": length, "pid": rank, "tid": row}


def _label(kind: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}
