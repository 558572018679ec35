"""Validation: predicted against measured figures of configurations that somebody ran, and statistics over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autopar.ir.quantity import Quantity

GOOD_QUALITIES = ("A", "B")
"""Rows of which every input is known, or one or two are assumed: these alone count in summaries."""
KINDS = ("run", "ratio")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a cell of a table."""

    column: str
    message: str

    def __str__(self) -> str:
        return f"column {self.column}: {self.message}"


@dataclass(frozen=True)
class Pair:
    """A measured figure and its prediction; None where there is none."""

    measured: float | None = None
    predicted: Quantity | None = None

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        if not self.measured or self.predicted is None:
            return None
        return self.predicted.value / self.measured - 1


@dataclass(frozen=True)
class ValidatedRow:
    """One row of a table.

    Attributes:
        source: the table's name.
        title: of the publication.
        quality: A every input known, B one or two assumed, C plan or dimensions unknown.
        kind: `run`, or `ratio`: `memory` is a ratio to another configuration, of unit 1, and there is no time.
        sweep: rows of one source with equal `sweep` run the same model on the same type of GPU.
        work: GPU-seconds times this are comparable within a sweep: 1 / (GPUs x tokens) turned around.
        configuration: in words.
        assumed: what the row does not say, and was assumed.
        is_oom, predicted_oom: whether the run lacked memory, and should have.
        faults: of its cells; such a row is not priced.
        skipped: why it was not priced, "" if it was.
        free_s: step time of the best plan on the same GPUs, if it was asked for.
    """

    row_id: str
    source: str
    title: str = ""
    quality: str = ""
    kind: str = "run"
    sweep: str = ""
    work: float = 0.0
    configuration: str = ""
    assumed: tuple[str, ...] = ()
    time_s: Pair = field(default_factory=Pair)
    memory_gib: Pair = field(default_factory=Pair)
    energy_j: Pair = field(default_factory=Pair)
    is_oom: bool | None = None
    predicted_oom: bool | None = None
    faults: tuple[Fault, ...] = ()
    skipped: str = ""
    free_s: float | None = None

    @property
    def has_figures(self) -> bool:
        """Whether something was measured that a prediction can be held against."""
        return self.time_s.measured is not None or self.memory_gib.measured is not None or bool(self.is_oom)

    @property
    def counts(self) -> bool:
        """Whether summaries count it."""
        return self.quality in GOOD_QUALITIES


@dataclass(frozen=True)
class Accuracy:
    """Errors over rows; None where nothing can be said.

    Attributes:
        num_rows: rows with a measured time or memory that are sound enough to count.
        num_priced: those of them that were priced.
        median_ape_s, p90_ape_s: absolute percentage error of seconds as a share (0.08 is 8 %), median and 90th
            percentile by linear interpolation; of memory likewise.
        kendall_tau: rank correlation (tau-b) of GPU-seconds per token over all pairs of rows within sweeps.
        num_labels, num_labels_right: runs known to fit or not to fit into memory, and those predicted so.
        num_free, num_free_good: rows for which the free plan was sought, and where it is at least as good.
    """

    num_rows: int
    num_priced: int
    num_times: int
    median_ape_s: float | None
    p90_ape_s: float | None
    num_memories: int
    median_ape_memory: float | None
    p90_ape_memory: float | None
    kendall_tau: float | None
    num_labels: int
    num_labels_right: int
    num_oom: int
    num_oom_right: int
    num_free: int
    num_free_good: int


@dataclass(frozen=True)
class Validation:
    """All rows in the order of the tables, and sentences for the reader about the tables."""

    rows: tuple[ValidatedRow, ...]
    notices: tuple[str, ...] = ()

    def by_source(self) -> dict[str, Accuracy]:
        """Accuracy over the rows that count, by table; rows of ratios are a line of their own."""
        groups: dict[str, list[ValidatedRow]] = {}
        for row in self.rows:
            groups.setdefault(line_name(row), [])
            if row.counts:
                groups[line_name(row)].append(row)
        return {name: accuracy(rows) for name, rows in groups.items()}

    def overall(self) -> Accuracy:
        """Over all runs that count."""
        return accuracy([row for row in self.rows if row.counts and row.kind == "run"])

    def uncertain(self) -> dict[str, Accuracy]:
        """Accuracy over rows of quality C that were priced, by table."""
        rows = [row for row in self.rows if not row.counts and not row.skipped]
        return {name: accuracy([r for r in rows if r.source == name]) for name in sorted({r.source for r in rows})}


def line_name(row: ValidatedRow) -> str:
    """Name of the line of a summary that a row counts in."""
    return row.source if row.kind == "run" else f"{row.source} ({row.kind})"


def accuracy(rows: Sequence[ValidatedRow]) -> Accuracy:
    """Statistics over rows."""
    times = _errors(row.time_s for row in rows)
    memories = _errors(row.memory_gib for row in rows)
    labelled = [row for row in rows if row.is_oom is not None and row.predicted_oom is not None]
    oom = [row for row in labelled if row.is_oom]
    freed = [
        (row.free_s, row.time_s.predicted.value) for row in rows if row.free_s is not None and row.time_s.predicted
    ]
    known = [row for row in rows if row.has_figures]
    return Accuracy(
        num_rows=len(known),
        num_priced=sum(not row.skipped for row in known),
        num_times=len(times),
        median_ape_s=_percentile(times, 50),
        p90_ape_s=_percentile(times, 90),
        num_memories=len(memories),
        median_ape_memory=_percentile(memories, 50),
        p90_ape_memory=_percentile(memories, 90),
        kendall_tau=pooled_tau(sweeps(rows).values()),
        num_labels=len(labelled),
        num_labels_right=sum(row.is_oom == row.predicted_oom for row in labelled),
        num_oom=len(oom),
        num_oom_right=sum(bool(row.predicted_oom) for row in oom),
        num_free=len(freed),
        num_free_good=sum(free <= pinned * (1 + 1e-9) for free, pinned in freed),
    )


def sweeps(rows: Iterable[ValidatedRow]) -> Mapping[str, list[tuple[float, float]]]:
    """Measured and predicted GPU-seconds per token of the rows of each sweep."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.kind == "run" and row.time_s.measured is not None and row.time_s.predicted is not None:
            pair = (row.time_s.measured * row.work, row.time_s.predicted.value * row.work)
            found.setdefault(f"{row.source} {row.sweep}", []).append(pair)
    return found


def pooled_tau(groups: Iterable[Sequence[tuple[float, float]]]) -> float | None:
    """Kendall's tau-b over all pairs within the groups; None where there is no pair that either side ranks."""
    agreeing, left, right = 0, 0, 0
    for group in groups:
        for i, (a, b) in enumerate(group):
            for c, d in group[:i]:
                first, second = _sign(a - c), _sign(b - d)
                agreeing += first * second
                left += first != 0
                right += second != 0
    return agreeing / math.sqrt(left * right) if left and right else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _errors(pairs: Iterable[Pair]) -> list[float]:
    return [abs(pair.error) for pair in pairs if pair.error is not None]


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(np.array(values), percent)) if values else None


def worst(rows: Iterable[ValidatedRow], pair: Callable[[ValidatedRow], Pair], count: int) -> list[ValidatedRow]:
    """The rows of which a figure errs most, worst first."""
    found = [(abs(error), i, row) for i, row in enumerate(rows) if (error := pair(row).error) is not None]
    return [row for _, _, row in sorted(found, key=lambda entry: (-entry[0], entry[1]))[:count]]
