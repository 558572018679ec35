"""Tariffs against brute force over start times, and what is wrong with a file, by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cli.money import parse_window
from autopar.errors import InputError
from autopar.planner.tariff import HOURS, Tariff, Window, extreme_starts, mean_rate, read_tariff

RATES = st.lists(st.integers(0, 40), min_size=HOURS, max_size=HOURS).map(lambda found: [r / 100 for r in found])
STEP_H = 1 / 60
"""Grid of the brute force; windows and durations lie on it, so that every corner does."""


def slow_mean(rates: list[float], start: int, minutes: int) -> float:
    """Minute by minute."""
    return sum(rates[(start + m) // 60 % HOURS] for m in range(minutes)) / minutes


@settings(max_examples=25, deadline=None)
@given(RATES, st.integers(0, 23 * 60 + 59), st.integers(0, 300), st.integers(1, 3000))
def test_starts_are_the_extremes_of_every_minute(rates: list[float], first: int, length: int, minutes: int) -> None:
    best, worst = extreme_starts(rates, Window(first / 60, length / 60), minutes / 60)
    means = [slow_mean(rates, start, minutes) for start in range(first, first + length + 1)]
    assert mean_rate(rates, best, minutes / 60) == pytest.approx(min(means), abs=1e-9)
    assert mean_rate(rates, worst, minutes / 60) == pytest.approx(max(means), abs=1e-9)
    assert all(0 <= start < HOURS for start in (best, worst))
    assert all((start * 60 - first + 1e-6) % (HOURS * 60) <= length + 2e-6 for start in (best, worst))


def test_whole_days_cost_the_same_whenever_they_start() -> None:
    rates = [hour / 10 for hour in range(HOURS)]
    assert {round(mean_rate(rates, start, 48.0), 9) for start in (0.0, 3.3, 17.9)} == {1.15}


def rows(count: int = HOURS) -> list[str]:
    return ["hour,price_per_kwh", *(f"{hour},0.{hour + 10}" for hour in range(count))]


def test_both_forms_of_a_file_say_the_same(tmp_path: Path) -> None:
    prices = [0.1 + hour / 100 for hour in range(HOURS)]
    grams = [float(300 - hour) for hour in range(HOURS)]
    lines = [f"{300 - h},{h},{0.1 + h / 100!r}" for h in reversed(range(HOURS))]
    (tmp_path / "t.csv").write_text("\n".join(["carbon_g_per_kwh,hour,price_per_kwh", *lines, ""]))
    (tmp_path / "t.json").write_text(json.dumps({"price_per_kwh": prices, "carbon_g_per_kwh": grams}))
    for name in ("t.csv", "t.json"):
        path = str(tmp_path / name)
        assert read_tariff(path) == Tariff(tuple(prices), tuple(grams), path)


BAD_CSV = {
    "unknown column": (["hour,tariff", *rows()[1:]], ":1: expected the columns"),
    "no rates": (["hour", *map(str, range(HOURS))], ":1: expected the columns"),
    "empty": ([], ":1: expected the columns"),
    "hour 24": ([*rows(), "24,0.1"], ":26: expected an hour"),
    "hour twice": ([*rows(), "7,0.1"], ":26: hour 7 stands twice"),
    "cell missing": ([*rows(5), "5", *rows()[7:]], ":7: expected 2 cells, found 1"),
    "no number": ([*rows(3), "3,cheap", *rows()[5:]], ":5: price_per_kwh: expected a number"),
    "infinite": ([*rows(3), "3,inf", *rows()[5:]], ":5: price_per_kwh: expected a number"),
    "hour missing": (rows(23), "hour 23 is missing"),
    "negative carbon": (
        ["hour,carbon_g_per_kwh", *(f"{h},{-1 if h == 9 else 1}" for h in range(HOURS))],
        ":11: carbon_g_per_kwh: expected a number of at least 0",
    ),
    "negative mean": (["hour,price_per_kwh", *(f"{h},-0.1" for h in range(HOURS))], "mean"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_table_is_named_by_line(case: str, tmp_path: Path) -> None:
    lines, message = BAD_CSV[case]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        read_tariff(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


BAD_JSON = {
    "23 hours": ('{\n"price_per_kwh": [' + ",".join(["1"] * 23) + "]}", ":2: price_per_kwh: expected 24 numbers"),
    "a word": ('{"price_per_kwh": [' + ",".join(["1"] * 23) + ', "dear"]}', ":1: price_per_kwh[23]"),
    "true": ('{"price_per_kwh": [true' + ",1" * 23 + "]}", ":1: price_per_kwh[0]"),
    "NaN": ('{"price_per_kwh": [NaN' + ",1" * 23 + "]}", "NaN"),
    "twice": ('{"price_per_kwh": [], "price_per_kwh": []}', "stands twice"),
    "cut short": ('{"price_per_kwh": [1,\n2,', "line 2"),
    "unknown key": ('{"price": [1]}', "expected the keys"),
    "nested": ('{"price_per_kwh":' + "[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_object_is_named_by_line(case: str, tmp_path: Path) -> None:
    text, message = BAD_JSON[case]
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_tariff(path)
    assert message in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the tariff"):
        read_tariff(tmp_path / "missing.csv")
    (tmp_path / "t.csv").write_bytes(b"hour\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_tariff(tmp_path / "t.csv")


def test_windows_run_over_midnight() -> None:
    assert parse_window("20-6") == Window(20.0, 10.0)
    assert parse_window("20:30-6:15") == Window(20.5, 9.75)
    assert parse_window("0-24") == Window()
    for text in ("", "20", "25-3", "3-25", "1:60-4", "24-1", "-1-3", "a-b"):
        with pytest.raises(InputError, match="--window"):
            parse_window(text)
