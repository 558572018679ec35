"""Tariffs: price and carbon of a kilowatt-hour by hour of the day, and when a job of constant power starts best.

A file gives one or both columns for each of the 24 hours, as CSV

    hour,price_per_kwh,carbon_g_per_kwh
    0,0.08,210

or as JSON, `{"price_per_kwh": [24 numbers], "carbon_g_per_kwh": [24 numbers]}`. Every day is alike. What a job pays
is its energy times the mean rate over its run; that mean is piecewise linear in the start, with corners where start or
end falls on a full hour, so the best and the worst start are found among those corners and the window's ends.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.codec import DecodeError, parse_json

HOURS = 24
PRICE, CARBON = "price_per_kwh", "carbon_g_per_kwh"
RATES = (PRICE, CARBON)


@dataclass(frozen=True)
class Tariff:
    """Rates by hour of the day, 24 each or None; `source` is the file.

    Attributes:
        prices: currency per kWh; single hours may be negative, as day-ahead prices are, their mean may not.
        carbon_g: gCO2e per kWh, >= 0.
    """

    prices: tuple[float, ...] | None
    carbon_g: tuple[float, ...] | None
    source: str


@dataclass(frozen=True)
class Window:
    """Hours of the day in which a job may start: from `first_h` in [0, 24) on, for `length_h` in [0, 24]."""

    first_h: float = 0.0
    length_h: float = float(HOURS)


@dataclass(frozen=True)
class Job:
    """A run of so many steps that starts within the window."""

    steps: int
    window: Window = Window()


def mean_rate(rates: Sequence[float], start_h: float, duration_h: float) -> float:
    """Mean of hourly rates over [start, start + duration], days alike; at the start itself for a duration of 0."""
    if duration_h <= 0:
        return rates[int(start_h) % HOURS]
    return (_integral(rates, start_h + duration_h) - _integral(rates, start_h)) / duration_h


def _integral(rates: Sequence[float], hour: float) -> float:
    """Integral of the rates from hour 0 to `hour` >= 0."""
    whole = math.floor(hour)
    days, rest = divmod(whole, HOURS)
    return days * sum(rates) + sum(rates[:rest]) + (hour - whole) * rates[rest]


def extreme_starts(rates: Sequence[float], window: Window, duration_h: float) -> tuple[float, float]:
    """Best and worst start, hours of the day in [0, 24); the earliest in the window of equals."""
    first, last = window.first_h, window.first_h + window.length_h
    corners = {first, last}
    for offset in (0.0, duration_h % 1.0):
        shifted = (hour - offset for hour in range(math.ceil(first), math.floor(last) + 2))
        corners |= {start for start in shifted if first <= start <= last}
    ordered = sorted(corners)
    means = [mean_rate(rates, start, duration_h) for start in ordered]
    slack = 1e-12 * max(1.0, *(abs(mean) for mean in means))
    best = next(s for s, mean in zip(ordered, means, strict=True) if mean <= min(means) + slack)
    worst = next(s for s, mean in zip(ordered, means, strict=True) if mean >= max(means) - slack)
    return best % HOURS, worst % HOURS


def read_tariff(path: str | Path) -> Tariff:
    """Read a tariff file; see the module docstring.

    Raises:
        InputError: it cannot be read, or is not 24 rates; names the line.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the tariff {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no tariff: it is not UTF-8 text (byte {error.start})") from error
    columns = _from_json(text, str(path)) if text.lstrip().startswith("{") else _from_csv(text, str(path))
    prices, carbon_g = columns.get(PRICE), columns.get(CARBON)
    if prices is not None and sum(prices) < 0:
        raise InputError(f"{path}: the mean of {PRICE} is below 0: such energy is not worth saving")
    return Tariff(prices, carbon_g, str(path))


def _from_csv(text: str, name: str) -> dict[str, tuple[float, ...]]:
    rows = csv.reader(text.splitlines())
    header = [cell.strip() for cell in next(rows, [])]
    if sorted(header) not in (sorted(["hour", *RATES]), ["hour", PRICE], [CARBON, "hour"]):
        told = ",".join(header)
        raise InputError(f"{name}:1: expected the columns hour and {PRICE}, {CARBON} or both, found {told!r}")
    found: dict[int, dict[str, float]] = {}
    for cells in rows:
        at = f"{name}:{rows.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise InputError(f"{at}: expected {len(header)} cells, found {len(cells)}")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        hour = row.pop("hour")
        if not re.fullmatch(r"[0-9]{1,2}", hour) or int(hour) >= HOURS:
            raise InputError(f"{at}: expected an hour from 0 to 23, found {hour!r}")
        if int(hour) in found:
            raise InputError(f"{at}: hour {int(hour)} stands twice")
        found[int(hour)] = {column: _number(cell, column, at) for column, cell in row.items()}
    missing = sorted(set(range(HOURS)) - found.keys())
    if missing:
        raise InputError(f"{name}: hour {missing[0]} is missing; a tariff gives all 24 hours from 0 to 23")
    return {c: tuple(found[hour][c] for hour in range(HOURS)) for c in header if c != "hour"}


def _from_json(text: str, name: str) -> dict[str, tuple[float, ...]]:
    try:
        content = parse_json(text)
    except DecodeError as error:
        raise InputError(f"{name}: {error}") from error
    if not content or not content.keys() <= set(RATES):
        raise InputError(f"{name}: expected the keys {PRICE}, {CARBON} or both, found {', '.join(content)}")
    columns: dict[str, tuple[float, ...]] = {}
    for key, values in content.items():
        at = f"{name}:{_line_of(text, key)}"
        if not isinstance(values, list) or len(values) != HOURS:
            count = f"{len(values)} values" if isinstance(values, list) else repr(values)
            raise InputError(f"{at}: {key}: expected 24 numbers, one per hour, found {count}")
        columns[key] = tuple(_number(value, f"{key}[{hour}]", at) for hour, value in enumerate(values))
    return columns


def _line_of(text: str, key: str) -> int:
    return text[: text.index(f'"{key}"')].count("\n") + 1


def _number(value: Any, column: str, at: str) -> float:
    """A finite rate, of carbon not negative."""
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    least = 0.0 if column.startswith(CARBON) else -math.inf
    if not (math.isfinite(number) and number >= least):
        raise InputError(f"{at}: {column}: expected a number{' of at least 0' if least == 0 else ''}, found {value!r}")
    return number
