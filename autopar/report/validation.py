"""Predicted against measured: tables of rows and of sources, what was not priced and why; JSON; a scatter plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from autopar.ir.validation import Accuracy, Pair, ValidatedRow, Validation
from autopar.report.figure import check_plot, save_figure
from autopar.report.text import WIDTH, table, wrapped


def validation_report(found: Validation) -> str:
    """The whole report; every line fits into 80 columns."""
    parts = [*_row_tables(found.rows), _summary(found), _left_out(found.rows), _bad_rows(found.rows)]
    parts.append([line for notice in found.notices for line in wrapped("Note", notice)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def _row_tables(rows: Sequence[ValidatedRow]) -> list[list[str]]:
    """One table of each source's priced rows."""
    found = []
    for source in _sources(rows):
        own = [row for row in rows if row.source == source and not row.skipped]
        if own:
            found.append([f"{source}: seconds per step; GiB per GPU, or shares of another run's", *_row_table(own)])
    return found


def _sources(rows: Iterable[ValidatedRow]) -> list[str]:
    return list(dict.fromkeys(row.source for row in rows))


def _row_table(rows: Sequence[ValidatedRow]) -> list[str]:
    """Without the columns that none of the rows fills; what does not fit into the width is cut from the plan."""
    columns = [
        ["row", *(row.row_id for row in rows)],
        *_columns(("seconds", "predicted", "error"), [_pair_cells(row.time_s) for row in rows]),
        *_columns(("memory", "predicted", "error"), [_memory_cells(row) for row in rows]),
        ["configuration", *(("" if row.counts else f"({row.quality}) ") + row.configuration for row in rows)],
    ]
    return _lines(columns, left=(0, -1))


def _columns(heading: Sequence[str], cells: Sequence[Sequence[str]]) -> list[list[str]]:
    if all(set(row) == {"-"} for row in cells):
        return []
    return [[name, *column] for name, column in zip(heading, zip(*cells, strict=True), strict=True)]


def _lines(columns: Sequence[Sequence[str]], left: Iterable[int]) -> list[str]:
    """A table whose columns `left` are aligned to the left."""
    aligned = [list(column) for column in columns]
    for index in left:
        width = max(len(cell) for cell in aligned[index])
        aligned[index] = [cell.ljust(width) for cell in aligned[index]]
    return [line[:WIDTH].rstrip() for line in table(list(zip(*aligned, strict=True)))]


def _memory_cells(row: ValidatedRow) -> tuple[str, str, str]:
    predicted = row.memory_gib.predicted
    if row.is_oom and row.memory_gib.measured is None and predicted is not None:
        return "OOM", f"{predicted.value:.4g}", "right" if row.predicted_oom else "wrong"
    return _pair_cells(row.memory_gib)


def _pair_cells(pair: Pair) -> tuple[str, str, str]:
    if pair.measured is None:
        return "-", "-", "-"
    predicted = "-" if pair.predicted is None else f"{pair.predicted.value:.4g}"
    return f"{pair.measured:.4g}", predicted, "-" if pair.error is None else f"{pair.error:+.1%}"


def _summary(found: Validation) -> list[str]:
    named = [*found.by_source().items(), ("all runs", found.overall())]
    named += [(f"{name}, quality C", accuracy) for name, accuracy in found.uncertain().items()]
    rows: list[tuple[str, ...]] = [("", "priced", "seconds", "p90", "memory", "tau", "fits")]
    rows += [_summary_cells(name, accuracy) for name, accuracy in named]
    lines = _lines([list(column) for column in zip(*rows, strict=True)], left=(0,))
    words = (
        "median and 90th percentile of absolute errors over rows of quality A and B; tau: rank correlation of "
        "GPU-seconds per token between runs of one model on one type of GPU; fits: runs of which it is known whether "
        "they fit into memory, and that are predicted so"
    )
    freed = [
        f"{name}: {a.num_free_good} of {a.num_free} rows with a free plan at least as good"
        for name, a in named
        if a.num_free
    ]
    return ["Errors", *lines, "", *wrapped("", words), *(line for words in freed for line in wrapped("", words))]


def _summary_cells(name: str, found: Accuracy) -> tuple[str, ...]:
    return (
        name[:30],
        f"{found.num_priced}/{found.num_rows}",
        *(
            "-" if share is None else f"{share:.1%}"
            for share in (found.median_ape_s, found.p90_ape_s, found.median_ape_memory)
        ),
        "-" if found.kendall_tau is None else f"{found.kendall_tau:.2f}",
        f"{found.num_labels_right}/{found.num_labels}" if found.num_labels else "-",
    )


def _left_out(rows: Sequence[ValidatedRow]) -> list[str]:
    """Rows that were not priced, by reason; bad rows have a place of their own."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.skipped and not row.faults:
            reasons.setdefault((row.source, row.skipped), []).append(row.row_id)
    lines = []
    for (source, reason), names in reasons.items():
        lines += wrapped("", f"{source}, {reason}: {', '.join(names)}")
    return ["Not priced", *lines] if lines else []


def _bad_rows(rows: Sequence[ValidatedRow]) -> list[str]:
    lines = []
    for row in rows:
        for fault in row.faults:
            lines += wrapped("", f"{row.source}, row {row.row_id}, {fault}")
    return ["Bad rows, not priced", *lines] if lines else []


def validation_json(found: Validation) -> dict[str, Any]:
    """Plain numbers, units in the names, None where there is no value."""
    return {
        "rows": [_row_json(row) for row in found.rows],
        "summary": {name: _accuracy_json(accuracy) for name, accuracy in found.by_source().items()},
        "overall": _accuracy_json(found.overall()),
        "quality_c": {name: _accuracy_json(accuracy) for name, accuracy in found.uncertain().items()},
        "notices": list(found.notices),
    }


def _row_json(row: ValidatedRow) -> dict[str, Any]:
    content: dict[str, Any] = {
        "row_id": row.row_id,
        "source": row.source,
        "title": row.title,
        "quality": row.quality,
        "configuration": row.configuration,
        "assumed": list(row.assumed),
        "skipped": row.skipped or None,
        "faults": [{"column": fault.column, "message": fault.message} for fault in row.faults],
        "measured_oom": row.is_oom,
        "predicted_oom": row.predicted_oom,
        "free_s": row.free_s,
    }
    memory, ratio = (row.memory_gib, Pair()) if row.kind == "run" else (Pair(), row.memory_gib)
    pairs = {"s": row.time_s, "memory_gib": memory, "memory_ratio": ratio, "j": row.energy_j}
    for name, pair in pairs.items():
        predicted = pair.predicted
        content[f"measured_{name}"] = pair.measured
        content[f"predicted_{name}"] = None if predicted is None else predicted.value
        content[f"predicted_{name}_low"] = None if predicted is None else predicted.low
        content[f"predicted_{name}_high"] = None if predicted is None else predicted.high
    return content


def _accuracy_json(found: Accuracy) -> dict[str, Any]:
    return {"n": found.num_priced, **asdict(found)}


def plot_validation(found: Validation, path: str) -> None:
    """Predicted over measured step time and memory, one colour per source; the suffix names the format.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written in that format.
    """
    check_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    rows = [row for row in found.rows if row.kind == "run"]
    times = {source: [row.time_s for row in rows if row.source == source] for source in _sources(rows)}
    memories = {source: [row.memory_gib for row in rows if row.source == source] for source in _sources(rows)}
    _draw(panels[0], times, "step time, s")
    _draw(panels[1], memories, "peak memory per GPU, GiB")
    save_figure(figure, path)


def _draw(axes: Any, pairs: dict[str, list[Pair]], what: str) -> None:
    """Points around the diagonal, with lines of 20 % error."""
    known = {
        source: [(p.measured, p.predicted.value) for p in own if p.measured is not None and p.predicted is not None]
        for source, own in pairs.items()
    }
    values = [value for points in known.values() for point in points for value in point]
    ends = (min(values) / 1.3, max(values) * 1.3) if values else (0.1, 10.0)
    for factor, style in ((1.0, "-"), (0.8, ":"), (1.2, ":")):
        axes.plot(ends, [factor * end for end in ends], style, color="0.6", linewidth=1, zorder=1)
    for source, points in known.items():
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, label=source, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"measured {what}", ylabel=f"predicted {what}")
    axes.set_title("lines: equal, 20 % off", fontsize=9)
    axes.grid(alpha=0.3)
    if values:
        axes.legend(fontsize=7)
