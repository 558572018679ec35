"""What a page shows of the simulated step: charts of the schedule, of both streams, and of memory over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from autopar.ir.plan import Plan
from autopar.ir.streams import PASSES, Span, Streams
from autopar.ir.timeline import BACKWARD, FORWARD, STEP, WEIGHT, Interval, Timeline
from autopar.report.page_html import Markup, joined, section, tag
from autopar.report.page_svg import Mark, key, rows, strip, ticks
from autopar.report.sharding import BlockSplit
from autopar.report.trace import pass_of
from autopar.units import format_bytes, format_seconds

MOST_RANKS = 32
MOST_MARKS = 3000
"""Of the schedule, and again of its collectives."""
MOST_OF_RANK = 120
ACTIONS = MappingProxyType({
    FORWARD: ("k0", "forward"), BACKWARD: ("k1", "backward"), WEIGHT: ("k6", "backward of weights"),
    STEP: ("k2", "once a step"),
})  # fmt: skip
EXPOSED = "waiting for collectives"
ROUNDING = 1e-9
"""Share of a step below which a wait is none."""
MERGED = "k5"
COLLECTIVE = "beside"
WORDS = MappingProxyType({
    "forward": "forward", "backward": "backward", "gather": "gather parameters", "regather": "gather parameters again",
    "scatter": "scatter gradients", "sync": "synchronise gradients", "weight": "gradients of weights",
    "pass": "forward and backward of a pass", "send": "send samples to a pass", "return": "return a pass's gradient",
})  # fmt: skip
COLOURS_OF = MappingProxyType(
    {"gather": "k8", "regather": "k2", "scatter": "k4", "sync": "k3", "send": "k8", "return": "k4"}
)
"""Of collectives on a stream of their own."""
LANE = 0.55
"""Share of a rank's lane that its actions take; its collectives take the rest."""


@dataclass(frozen=True)
class StepDetail:
    """A plan's step, simulated again.

    Attributes:
        timeline: of the ranks.
        passes: per stage (chunk, in the order of the model): both streams of each of `ir.streams.PASSES`.
        memory_bytes: per rank: (seconds, bytes held from then on), without workspaces.
        dynamic_j: per stage (chunk): joules of its computing and moving beyond what waiting draws, of all devices and
            microbatches, sends between stages left out.
        splits: how the heavy ops are split.
    """

    timeline: Timeline
    passes: tuple[Mapping[str, Streams], ...]
    memory_bytes: tuple[tuple[tuple[float, float], ...], ...]
    dynamic_j: tuple[float, ...]
    splits: tuple[BlockSplit, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.timeline.stages)

    def times_s(self, rank: int) -> dict[str, float]:
        """Seconds of a rank by cause: the names of `ACTIONS`, and computation that waits for collectives."""
        found = {name: 0.0 for _, name in ACTIONS.values()} | {EXPOSED: 0.0}
        for interval in self.timeline.stages[rank]:
            found[ACTIONS[interval.action.kind][1]] += interval.stop_s - interval.start_s
        for interval, streams in _with_streams(self, rank):
            computing = sum(span.stop_s - span.start_s for span in streams.computation)
            exposed = interval.stop_s - interval.start_s - computing
            if exposed <= ROUNDING * interval.stop_s:
                continue
            found[EXPOSED] += exposed
            found[ACTIONS[interval.action.kind][1]] -= exposed
        return found


def chosen_ranks(num_ranks: int) -> list[int]:
    """All, or as many as are drawn: the first, the last, and some evenly between them."""
    if num_ranks <= MOST_RANKS:
        return list(range(num_ranks))
    return [round(i * (num_ranks - 1) / (MOST_RANKS - 1)) for i in range(MOST_RANKS)]


def timeline_section(plan: Plan, detail: StepDetail) -> Markup:
    """Rank by rank, what runs when."""
    end, ranks = detail.timeline.makespan_s or 1.0, chosen_ranks(detail.num_ranks)
    budget = min(max(8, MOST_MARKS // len(ranks)), MOST_OF_RANK)
    collectives = {rank: list(_collectives(detail, rank)) for rank in ranks}
    drawn = 0 < sum(map(len, collectives.values())) <= MOST_MARKS
    entries, num_left_out = [], 0
    for rank in ranks:
        intervals = detail.timeline.stages[rank]
        marks, merged = schedule_marks(intervals, budget, LANE if drawn else 1.0)
        num_left_out += merged
        busy = detail.timeline.busy_s(rank) / end
        label = f"rank {rank}: {len(intervals)} actions, busy {busy:.0%} of the step"
        picture = strip([*marks, *(collectives[rank] if drawn else ())], end, label, height=24 if drawn else 18)
        entries.append((f"rank {rank}", picture, f"busy {busy:.0%}"))
    entries.append(("", ticks(end, format_seconds), ""))
    done = {interval.action.kind for intervals in detail.timeline.stages for interval in intervals}
    colours = [entry for kind, entry in ACTIONS.items() if kind in done]
    colours += [(COLLECTIVE, "collectives on a stream of their own (lower lane)")] if drawn else []
    colours += (
        [(MERGED, "forwards and backwards, drawn as one block as high as their share of the time")]
        if num_left_out
        else []
    )
    too_many = any(collectives.values()) and not drawn
    remarks = _price_remark(plan, detail) + _remarks(detail, len(ranks), num_left_out, too_many)
    return section(
        "Timeline of one step",
        "What each pipeline rank does when in the simulated schedule; where nothing is drawn it waits.",
        key(colours),
        rows(entries),
        *(tag("p", words, class_="remark") for words in remarks),
    )


def _remarks(detail: StepDetail, num_drawn: int, num_left_out: int, too_many: bool) -> list[str]:
    found = []
    if num_drawn < detail.num_ranks:
        found.append(f"Drawn are {num_drawn} of {detail.num_ranks} ranks: the first, the last, and some between.")
    if num_left_out:
        found.append(f"{num_left_out} actions in the middle of the step are not drawn one by one.")
    if too_many:
        found.append("Collectives beside computation are too many to draw here; 'autopar explain --trace' writes all.")
    return found


def _price_remark(plan: Plan, detail: StepDetail) -> list[str]:
    """Where the simulation of now is not what the plan predicts."""
    then, now = plan.predicted.step_time_s.value, max(detail.timeline.makespan_s, plan.decisions.pace_s)
    if abs(now - then) <= 1e-6 * then:
        return []
    return [f"At the prices of now the step takes {format_seconds(now)}, in the plan {format_seconds(then)}."]


def schedule_marks(intervals: Sequence[Interval], most: int, bottom: float) -> tuple[list[Mark], int]:
    """Marks of a rank's actions, at most `most`; and how many actions stand in one block."""
    num_merged = 0 if len(intervals) <= most else len(intervals) - most + 1
    first = (len(intervals) - num_merged) // 2
    middle, marks = intervals[first : first + num_merged], []
    for interval in (*intervals[:first], *intervals[first + num_merged :]):
        colour, name = ACTIONS[interval.action.kind]
        marks.append(Mark(interval.start_s, interval.stop_s, colour, f"{_name(interval, name)}: {_span(interval)}"))
    if middle:
        marks.append(_merged_mark(middle))
    return [Mark(m.start, m.stop, m.colour, m.title, m.top * bottom, bottom) for m in marks], num_merged


def _merged_mark(intervals: Sequence[Interval]) -> Mark:
    """One block for many actions, as high as the share of the time in which anything runs."""
    counts = [sum(i.action.kind == kind for i in intervals) for kind in (FORWARD, BACKWARD)]
    length = intervals[-1].stop_s - intervals[0].start_s
    busy = sum(i.stop_s - i.start_s for i in intervals) / length if length else 1.0
    title = f"{counts[0]} forwards and {counts[1]} backwards by turns, busy {busy:.0%} of that time"
    return Mark(intervals[0].start_s, intervals[-1].stop_s, MERGED, title, max(0.0, 1.0 - busy))


def _name(interval: Interval, name: str) -> str:
    if interval.action.kind == STEP:
        return name
    chunk = f", chunk {interval.action.chunk}" if interval.action.chunk else ""
    return f"{name} of microbatch {interval.action.microbatch}{chunk}"


def _span(span: Interval | Span) -> str:
    length = format_seconds(span.stop_s - span.start_s)
    return f"{length}, {format_seconds(span.start_s)} to {format_seconds(span.stop_s)}"


def _with_streams(detail: StepDetail, rank: int) -> Iterable[tuple[Interval, Streams]]:
    """A rank's forwards and backwards with what runs on both streams meanwhile."""
    intervals = detail.timeline.stages[rank]
    last = max(interval.action.microbatch for interval in intervals)
    for interval in intervals:
        action = interval.action
        if action.kind != STEP:
            own = detail.passes[action.chunk * detail.num_ranks + rank]
            yield interval, own[pass_of(action.kind, action.microbatch == last)]


def _collectives(detail: StepDetail, rank: int) -> Iterable[Mark]:
    """On the communication stream; neighbours without a pause between them are one mark."""
    for interval, streams in _with_streams(detail, rank):
        for start, stop, kinds in _merged(streams.communication):
            title = f"{kinds} during {interval.action}: {format_seconds(stop - start)}"
            yield Mark(interval.start_s + start, interval.start_s + stop, COLLECTIVE, title, LANE + 0.1)


def _merged(spans: Sequence[Span]) -> Iterable[tuple[float, float, str]]:
    """(start, stop, kinds) of runs of spans without a pause."""
    run: list[Span] = []
    for span in [*spans, None]:
        if run and (span is None or span.start_s > run[-1].stop_s * (1 + 1e-9)):
            yield run[0].start_s, run[-1].stop_s, ", ".join(dict.fromkeys(WORDS[own.kind] for own in run))
            run = []
        if span is not None:
            run.append(span)


def streams_section(detail: StepDetail) -> Markup:
    """Both streams of the slowest stage in one microbatch; nothing where no collective has a stream."""
    lengths = [sum(own[name].stop_s for name in PASSES) for own in detail.passes]
    stage = max(range(len(lengths)), key=lengths.__getitem__)
    own = detail.passes[stage]
    if not any(own[name].communication for name in PASSES):
        return Markup("")
    names = [name for name in PASSES if own[name].stop_s and (name != "last_backward" or own[name] != own["backward"])]
    end = max(own[name].stop_s for name in names) or 1.0
    entries = []
    for name in names:
        for row in ("computation", "communication"):
            spans: Sequence[Span] = getattr(own[name], row)
            marks = [_block_mark(span, i) for i, span in enumerate(spans)]
            label = f"{row} stream in {name.replace('_', ' ')}: {len(spans)} spans"
            entries.append((f"{name.replace('_', ' ')}, {row}", strip(marks, end, label), _busy(spans, own[name])))
    entries.append(("", ticks(end, format_seconds), ""))
    kinds = {span.kind for name in names for span in own[name].communication}
    colours = [("k0", "computation"), ("k5", "computation of every second block")]
    colours += [(COLOURS_OF[kind], WORDS[kind]) for kind in WORDS if kind in kinds]
    return section(
        f"Both streams of stage {stage} in one microbatch",
        "Which collectives run beside computation, and where computation waits for them, on the slowest stage.",
        key(colours), rows(entries),
    )  # fmt: skip


def _block_mark(span: Span, index: int) -> Mark:
    colour = COLOURS_OF.get(span.kind, "k5" if index % 2 else "k0")
    return Mark(span.start_s, span.stop_s, colour, f"{WORDS[span.kind]}, block {span.block}: {_span(span)}")


def _busy(spans: Sequence[Span], streams: Streams) -> str:
    busy = sum(span.stop_s - span.start_s for span in spans)
    return f"busy {busy / streams.stop_s:.0%}" if streams.stop_s else ""


def memory_curves(detail: StepDetail, capacity_bytes: float) -> Markup:
    """What each rank holds over the step, in strips."""
    end, ranks = detail.timeline.makespan_s or 1.0, chosen_ranks(detail.num_ranks)
    budget = max(8, MOST_MARKS // len(ranks))
    most = max(size for rank in ranks for _, size in detail.memory_bytes[rank]) or 1.0
    entries = []
    for rank in ranks:
        points = detail.memory_bytes[rank]
        peak = max(size for _, size in points)
        marks = [_level(start, stop, size, most) for start, stop, size in _levels(points, end, budget)]
        label = f"rank {rank} holds at most {format_bytes(peak)}"
        entries.append((f"rank {rank}", strip(marks, end, label, height=30), f"at most {format_bytes(peak)}"))
    entries.append(("", ticks(end, format_seconds), ""))
    words = (
        f"Parameters, gradients, optimizer states and kept activations; a full lane is {format_bytes(most)}, "
        f"{most / capacity_bytes:.0%} of what is usable. Workspaces, which come and go inside an action, are left out."
    )
    return joined([tag("h3", "Memory over the step"), tag("p", words, class_="about"), rows(entries)])


def _levels(points: Sequence[tuple[float, float]], end: float, most: int) -> list[tuple[float, float, float]]:
    """(start, stop, bytes); with more than `most` moments, the largest of several neighbours."""
    stops = [start for start, _ in points[1:]] + [end]
    levels = [(start, stop, size) for (start, size), stop in zip(points, stops, strict=True) if stop > start]
    width = -(-len(levels) // most)
    groups = [levels[i : i + width] for i in range(0, len(levels), width)]
    return [(own[0][0], own[-1][1], max(size for *_, size in own)) for own in groups]


def _level(start: float, stop: float, size: float, most: float) -> Mark:
    title = f"{format_bytes(size)} from {format_seconds(start)} to {format_seconds(stop)}"
    return Mark(start, stop, "area", title, 1.0 - size / most)
