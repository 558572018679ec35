"""Published tables: CSV rows of configurations that somebody ran, read strictly.

Columns are those of `COLUMNS`; an empty cell means that the publication does not say. Every fault names its row and
column; a row with a fault is not priced, the others are. Numbers hold numbers only; free texts are read by
`planner.wording`.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.validation import Fault

NEEDED = (
    "hardware", "n_gpus", "layers", "hidden", "heads", "seq", "dp", "tp", "pp", "mbs", "gbs", "iter_time_s",
)  # fmt: skip
"""Columns without which no row can be priced."""
OPTIONAL = (
    "row_id", "source_title", "source_ref", "gpu_mem_gb", "gpus_per_node", "interconnect", "model", "params_b",
    "kv_heads", "ffn", "vocab", "cp", "ep", "vpp", "sp", "zero", "ga", "recompute", "dtype", "compile", "fp8",
    "overlap_notes", "tokens_per_s_per_gpu", "tflops_per_gpu", "tflops_kind", "mem_gib", "mem_kind", "power_w_per_gpu",
    "status", "derived_fields", "config_quality", "notes",
)  # fmt: skip
"""Columns that count as empty where they are missing."""
COUNTS = (
    "gpus_per_node", "n_gpus", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "dp", "tp", "pp", "cp",
    "ep", "vpp", "mbs", "gbs", "ga",
)  # fmt: skip
"""Whole numbers of at least 1."""
NUMBERS = (
    "gpu_mem_gb", "params_b", "iter_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mem_gib", "power_w_per_gpu",
)  # fmt: skip
"""Positive numbers."""
TEXTS = (
    "source_title", "source_ref", "hardware", "interconnect", "model", "sp", "zero", "recompute", "dtype", "compile",
    "fp8", "overlap_notes", "mem_kind", "notes",
)  # fmt: skip
"""Free texts."""
STATUSES = ("ok", "oom", "failed")
QUALITIES = ("A", "B", "C")
MOST_DISAGREEMENT = 1.2
"""Ratio to which a step time and a rate of tokens of one row may differ: rounding and averaging explain less."""
THOUSANDFOLD = 100.0
"""From this ratio on, a unit is to blame."""


@dataclass(frozen=True)
class PublishedRow:
    """One row, typed. Numbers are None where the publication does not say; texts are as they stand there.

    `status` is in lower case; `quality` is the column config_quality; the others are called like their columns, units
    included.
    """

    row_id: str
    source_title: str
    source_ref: str
    hardware: str
    interconnect: str
    model: str
    sp: str
    zero: str
    recompute: str
    dtype: str
    compile: str
    fp8: str
    overlap_notes: str
    mem_kind: str
    notes: str
    status: str
    quality: str
    gpus_per_node: int | None
    n_gpus: int | None
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    ffn: int | None
    vocab: int | None
    seq: int | None
    dp: int | None
    tp: int | None
    pp: int | None
    cp: int | None
    ep: int | None
    vpp: int | None
    mbs: int | None
    gbs: int | None
    ga: int | None
    gpu_mem_gb: float | None
    params_b: float | None
    iter_time_s: float | None
    tokens_per_s_per_gpu: float | None
    tflops_per_gpu: float | None
    mem_gib: float | None
    power_w_per_gpu: float | None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step: as published, or from the rate of tokens."""
        return self.iter_time_s if self.iter_time_s is not None else self.step_s_of_rate

    @property
    def step_s_of_rate(self) -> float | None:
        """Seconds of a step that the published rate of tokens means."""
        if self.gbs is None or self.seq is None or self.n_gpus is None or self.tokens_per_s_per_gpu is None:
            return None
        return self.gbs * self.seq / (self.tokens_per_s_per_gpu * self.n_gpus)


@dataclass(frozen=True)
class TableRow:
    """A row as read: typed where it is sound, else None beside its faults. `name` is its row_id or its line."""

    source: str
    name: str
    row: PublishedRow | None
    faults: tuple[Fault, ...] = ()
    quality: str = ""


def read_tables(paths: Sequence[str]) -> tuple[tuple[TableRow, ...], tuple[str, ...]]:
    """All rows of all files in order, and sentences about columns that are missing.

    Raises:
        InputError: a file cannot be read, or has no header with any known column.
    """
    rows: list[TableRow] = []
    notices: list[str] = []
    seen: dict[str, str] = {}
    for path, source in zip(paths, source_names(paths), strict=True):
        header, records = _records(path)
        missing = [name for name in OPTIONAL if name not in header]
        if missing:
            notices.append(f"{path}: read as empty, because missing: {', '.join(missing)}")
        rows += (_table_row(source, line, cells, header, seen) for line, cells in records)
    return tuple(rows), tuple(notices)


def source_names(paths: Sequence[str]) -> tuple[str, ...]:
    """File names without suffix; whole paths where two would be called the same."""
    stems = [Path(path).stem for path in paths]
    return tuple(stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True))


def _records(path: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and the cells of every row with its line."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        records = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise InputError(f"{path}: not CSV: {error} (line {reader.line_num})") from None
    if not set(header) & set(NEEDED):
        raise InputError(f"{path}: no header: expected columns such as {', '.join(NEEDED[:4])}")
    doubled = sorted({name for name in header if name and header.count(name) > 1})
    if doubled:
        raise InputError(f"{path}: the header names {', '.join(doubled)} twice")
    return header, records


def _table_row(source: str, line: int, cells: Sequence[str], header: Sequence[str], seen: dict[str, str]) -> TableRow:
    given = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
    name = given.get("row_id") or f"line {line}"
    faults = [Fault(column, "missing from the header") for column in NEEDED if column not in header]
    if len(cells) != len(header):
        column = header[min(len(cells), len(header) - 1)]
        faults.append(Fault(column, f"the row has {len(cells)} cells, the header {len(header)}"))
    if name in seen:
        faults.append(Fault("row_id", f"{name!r} is there twice, first in {seen[name]}"))
    seen.setdefault(name, f"{source}, line {line}")
    numbers: dict[str, float | None] = {}
    for column in (*COUNTS, *NUMBERS):
        found = _number(column, given.get(column, ""))
        faults += [found] if isinstance(found, Fault) else []
        numbers[column] = None if isinstance(found, Fault) else found
    status, quality = given.get("status", "").lower() or "ok", given.get("config_quality", "").upper() or "B"
    faults += _words(status, quality)
    if not faults:
        row = _typed(name, given, numbers, status, quality)
        faults += structure_faults(row)
        return TableRow(source, name, None if faults else row, tuple(faults), quality)
    return TableRow(source, name, None, tuple(faults), quality)


def _words(status: str, quality: str) -> Iterator[Fault]:
    if status not in STATUSES:
        yield Fault("status", f"{status!r} is none of ok, OOM, failed")
    if quality not in QUALITIES:
        yield Fault("config_quality", f"{quality!r} is none of {', '.join(QUALITIES)}")


def _number(column: str, text: str) -> float | int | Fault | None:
    if not text:
        return None
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return Fault(column, f"not a number: {text!r}")
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        return Fault(column, f"must be positive and finite, found {text}")
    if column not in COUNTS:
        return value
    return int(value) if value == int(value) else Fault(column, f"must be a whole number, found {text}")


def _typed(
    name: str, given: Mapping[str, str], numbers: Mapping[str, float | None], status: str, quality: str
) -> PublishedRow:
    fields: dict[str, Any] = {column: given.get(column, "") for column in TEXTS}
    fields |= {column: numbers[column] for column in (*COUNTS, *NUMBERS)}
    return PublishedRow(row_id=name, status=status, quality=quality, **fields | _derived(fields))


def _derived(counts: Mapping[str, Any]) -> dict[str, int]:
    """Counts that follow from others."""
    found: dict[str, int] = {}
    if counts["gbs"] is None and counts["mbs"] and counts["dp"] and counts["ga"]:
        found["gbs"] = counts["mbs"] * counts["dp"] * counts["ga"]
    if counts["mbs"] is None and counts["gbs"] and counts["dp"] and counts["ga"]:
        each, rest = divmod(counts["gbs"], counts["dp"] * counts["ga"])
        found |= {"mbs": each} if each and not rest else {}
    return found


def structure_faults(row: PublishedRow) -> list[Fault]:
    """Contradictions between the numbers of one row, columns named."""
    return [*_division_faults(row), *_count_faults(row), *_rate_faults(row)]


def _division_faults(row: PublishedRow) -> Iterator[Fault]:
    divisions: Iterable[tuple[str, int | None, str, int | None]] = (
        ("hidden", row.hidden, "heads", row.heads),
        ("heads", row.heads, "kv_heads", row.kv_heads),
        ("seq", row.seq, "cp", row.cp),
    )
    for column, whole, by, part in divisions:
        if whole is not None and part is not None and whole % part:
            yield Fault(column, f"{whole} does not divide by {by} = {part}")
    if row.layers is not None and row.pp is not None and row.layers < row.pp * (row.vpp or 1):
        yield Fault("pp", f"{row.pp} stages x {row.vpp or 1} chunks of {row.layers} layers")


def _count_faults(row: PublishedRow) -> Iterator[Fault]:
    degrees = (row.dp, row.tp, row.pp)
    if row.n_gpus is not None and None not in degrees:
        product = math.prod(degree for degree in (*degrees, row.cp) if degree is not None)
        if product != row.n_gpus:
            words = "dp x tp x pp x cp" if row.cp else "dp x tp x pp"
            yield Fault("n_gpus", f"{row.n_gpus}, but {words} = {product}")
    if row.gbs is None or row.dp is None or row.mbs is None:
        return
    at_once = row.mbs * row.dp
    if row.gbs % at_once:
        yield Fault("gbs", f"{row.gbs} does not divide into microbatches of mbs x dp = {at_once}")
    elif row.ga is not None and row.ga * at_once != row.gbs:
        yield Fault("ga", f"{row.ga}, but gbs / (mbs x dp) = {row.gbs // at_once}")


def _rate_faults(row: PublishedRow) -> Iterator[Fault]:
    expected = row.step_s_of_rate
    if row.iter_time_s is None or expected is None:
        return
    ratio = row.iter_time_s / expected
    if 1 / MOST_DISAGREEMENT <= ratio <= MOST_DISAGREEMENT:
        return
    doubt = "; is a unit off by 1,000?" if max(ratio, 1 / ratio) >= THOUSANDFOLD else ""
    yield Fault("iter_time_s", f"{row.iter_time_s:g} s, but tokens_per_s_per_gpu means {expected:.4g} s{doubt}")
