"""Validation: every row of published tables priced as `estimate` would price it, beside what was measured.

There is no formula here: a row becomes a model of a built-in family, software, GPUs and pins (`planner.configuration`),
and `planner.estimate.price_configuration` does the rest. Rows that share a graph share its capture. Processes change
nothing but the time: every row is priced by itself, and rows come back in the order of the tables.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace

from autopar.errors import AutoparError, InfeasibleError, InputError, WorkerError
from autopar.ir.plan import Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.validation import Pair, ValidatedRow, Validation
from autopar.planner.configuration import Configuration, configure, plausibility_faults
from autopar.planner.estimate import Priced, free_plan, price_configuration
from autopar.planner.plan import CapturedGraph, capture_graph
from autopar.planner.published import PublishedRow, TableRow, read_tables
from autopar.planner.request import Progress, say_nothing
from autopar.planner.wording import read_percentage
from autopar.units import GIB

MOST_TOGETHER = 6
"""Rows that one process prices in a row on one capture; more would leave other processes idle at the end."""
OF_A_FORMULA = ("parameters", "gradients", "optimizer", "activations")
"""Causes of memory that analytic figures count."""


@dataclass(frozen=True)
class _Job:
    """Rows on one graph, by their place in the tables, and whether to seek the free plan too."""

    places: tuple[int, ...]
    rows: tuple[PublishedRow, ...]
    configurations: tuple[Configuration, ...]
    free: bool


def validate_tables(
    paths: Sequence[str], *, jobs: int | None = None, free: bool = False, progress: Progress | None = None
) -> Validation:
    """Price all rows of CSV files in the schema of `planner.published`.

    Args:
        jobs: processes; None: one per processor. Any number gives equal results.
        free: also find the best plan on the same GPUs, which takes longer.

    Raises:
        InputError: a file cannot be read, or has no header.
    """
    tables, notices = read_tables(paths)
    rows, work = _prepared(tables, free)
    tell = progress or say_nothing
    total, done = sum(len(job.places) for job in work), 0
    for places, priced in _run(work, min(len(work), jobs or _processors())):
        done += len(places)
        tell(f"priced {done} of {total} rows")
        for place, figures in zip(places, priced, strict=True):
            rows[place] = replace(figures, source=rows[place].source)
    return Validation(tuple(rows), notices)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepared(tables: Sequence[TableRow], free: bool) -> tuple[list[ValidatedRow], list[_Job]]:
    """All rows without predictions, and what is to be priced, grouped by graph, the largest groups first."""
    rows: list[ValidatedRow] = []
    groups: dict[object, list[tuple[int, PublishedRow, Configuration]]] = {}
    for place, entry in enumerate(tables):
        if entry.row is None:
            rows.append(ValidatedRow(entry.name, entry.source, quality=entry.quality, faults=entry.faults, skipped=BAD))
            continue
        blank = replace(described(entry.row), source=entry.source)
        try:
            configuration = configure(entry.row)
        except InputError as error:
            rows.append(replace(blank, skipped=str(error)))
            continue
        faults = plausibility_faults(entry.row, configuration)
        skipped = BAD if faults else _unmeasured(entry.row, configuration)
        rows.append(replace(blank, faults=faults, skipped=skipped, configuration=configuration.words))
        if not skipped:
            groups.setdefault(configuration.capture_key, []).append((place, entry.row, configuration))
    work = []
    for group in groups.values():
        for at in range(0, len(group), MOST_TOGETHER):
            places, published, configurations = zip(*group[at : at + MOST_TOGETHER], strict=True)
            work.append(_Job(places, published, configurations, free))
    return rows, sorted(work, key=lambda job: -len(job.places))


BAD = "bad row"
BUGS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What a mistake of ours raises: it is told of the row that shows it, and the others are priced all the same."""


def _unmeasured(row: PublishedRow, configuration: Configuration) -> str:
    if row.status == "failed":
        return "the run failed"
    is_ratio = configuration.memory_kind == "ratio" and read_percentage(row.mem_kind) is not None
    if row.status == "oom" or is_ratio or row.step_s is not None or row.mem_gib is not None:
        return ""
    return "nothing was measured"


def _run(work: Sequence[_Job], jobs: int) -> Iterator[tuple[tuple[int, ...], tuple[ValidatedRow, ...]]]:
    if jobs <= 1:
        yield from ((job.places, price_rows(job)) for job in work)
        return
    with _pool(jobs) as pool:
        running = {pool.submit(price_rows, job): job for job in work}
        try:
            for future in as_completed(running):
                yield running[future].places, future.result()
        except BrokenProcessPool as error:
            raise WorkerError("a process that priced rows was killed; fewer --jobs need less memory") from error


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, at once where it ends early."""
    others = {child.pid for child in multiprocessing.active_children()}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield pool
    except BaseException:
        for child in multiprocessing.active_children():
            if child.pid not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def price_rows(job: _Job) -> tuple[ValidatedRow, ...]:
    """Prices of rows that share a graph."""
    first, pairs = job.configurations[0], tuple(zip(job.rows, job.configurations, strict=True))
    try:
        captured = capture_graph(first.source, first.options, first.request.batch_size)
    except AutoparError as error:
        return tuple(_skipped(row, found, str(error)) for row, found in pairs)
    return tuple(_priced_or_skipped(row, found, captured, job.free) for row, found in pairs)


def _priced_or_skipped(row: PublishedRow, found: Configuration, captured: CapturedGraph, free: bool) -> ValidatedRow:
    try:
        return price_row(row, found, captured, free)
    except AutoparError as error:
        return _skipped(row, found, str(error))
    except BUGS as error:
        return _skipped(row, found, f"a bug of autopar: {type(error).__name__}: {error}")


def _skipped(row: PublishedRow, found: Configuration, reason: str) -> ValidatedRow:
    line = reason.splitlines()[0]
    return replace(described(row), skipped=line, configuration=found.words, assumed=found.assumed)


def price_row(row: PublishedRow, found: Configuration, captured: CapturedGraph, free: bool = False) -> ValidatedRow:
    """One row with its predictions; `captured` is the graph of its configuration.

    Raises:
        AutoparError: the configuration cannot be priced.
    """

    def price(configuration: Configuration) -> Priced:
        return price_configuration(
            configuration.source, configuration.options, configuration.request, captured=captured
        )

    priced = price(found)
    predicted = priced.planned.plan.predicted
    blank = described(row)
    is_run = found.memory_kind in ("allocated", "reserved")
    return replace(
        blank,
        kind="ratio" if found.memory_kind == "ratio" else "run",
        configuration=found.words,
        assumed=found.assumed,
        time_s=replace(blank.time_s, predicted=predicted.step_time_s),
        memory_gib=_memory(row, found, predicted, price),
        energy_j=replace(blank.energy_j, predicted=_of_gpus(predicted)),
        is_oom=blank.is_oom if is_run else None,
        predicted_oom=not priced.fits,
        free_s=_free_s(found, captured, priced) if free else None,
    )


def described(row: PublishedRow) -> ValidatedRow:
    """A row with what was measured, before it is priced."""
    step_s, power_w, gpus = row.step_s, row.power_w_per_gpu, row.n_gpus or 0
    tokens = (row.gbs or 0) * (row.seq or 0)
    model = "/".join(str(size) for size in (row.layers, row.hidden, row.heads, row.ffn, row.vocab))
    return ValidatedRow(
        row.row_id,
        "",
        title=row.source_title,
        quality=row.quality,
        sweep=f"{row.hardware} {model}",
        work=gpus / tokens if tokens else 0.0,
        time_s=Pair(step_s),
        memory_gib=Pair(row.mem_gib),
        energy_j=Pair(step_s * power_w * gpus if step_s is not None and power_w is not None else None),
        is_oom=row.status == "oom" if row.status == "oom" or step_s is not None else None,
    )


def _memory(
    row: PublishedRow, found: Configuration, predicted: Prediction, price: Callable[[Configuration], Priced]
) -> Pair:
    """Measured and predicted memory in the sense of the row's figure."""
    if found.memory_kind == "ratio":
        pins = replace(found.request.pins, recompute="none", sequence=False)
        baseline = price(replace(found, request=replace(found.request, pins=pins))).planned.plan.predicted
        return Pair(read_percentage(row.mem_kind), _ratio(_first_stage(predicted), _first_stage(baseline)))
    if found.memory_kind == "analytic":
        counted = sum(predicted.stages[0].memory_by_cause.get(cause, 0.0) for cause in OF_A_FORMULA)
        peak = predicted.peak_memory_bytes[0]
        return Pair(row.mem_gib, _scaled(peak, counted / peak.value / GIB, "GiB"))
    peak = max(predicted.peak_memory_bytes, key=lambda quantity: quantity.value)
    return Pair(row.mem_gib, _scaled(peak, 1 / GIB, "GiB"))


def _first_stage(predicted: Prediction) -> float:
    return predicted.stages[0].memory_by_cause["activations"]


def _ratio(figure: float, baseline: float) -> Quantity:
    """Of two figures of one model, whose errors cancel."""
    value = figure / baseline
    return Quantity(value, "1", "modelled", value, value)


def _scaled(quantity: Quantity, factor: float, unit: str) -> Quantity:
    return Quantity(quantity.value * factor, unit, quantity.label, quantity.low * factor, quantity.high * factor)


def _of_gpus(predicted: Prediction) -> Quantity:
    """Energy of the GPUs without their hosts, which is what published power means."""
    hosts = predicted.energy_by_cause["host"]
    return _scaled(predicted.energy_j, 1 - hosts / predicted.energy_j.value, "J")


def _free_s(found: Configuration, captured: CapturedGraph, pinned: Priced) -> float | None:
    """Step time of the best plan on the same GPUs; None if none fits."""
    try:
        plan = free_plan(found.source, found.options, found.request, captured=captured, pinned=pinned)
    except InfeasibleError:
        return None
    return plan.predicted.step_time_s.value
