"""Errors, percentiles and rank correlation against numbers worked out by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from autopar.ir.quantity import Quantity
from autopar.ir.validation import Pair, ValidatedRow, Validation, accuracy, pooled_tau


def pair(measured: float | None, predicted: float | None) -> Pair:
    return Pair(measured, None if predicted is None else Quantity(predicted, "s", "modelled", predicted, predicted))


def run(name: str, seconds: Pair, memory: Pair | None = None, **fields: object) -> ValidatedRow:
    return ValidatedRow(name, "s", quality="A", work=1.0, time_s=seconds, memory_gib=memory or Pair(), **fields)  # type: ignore[arg-type]


def test_percentiles_of_absolute_errors() -> None:
    # Errors 10 %, -20 %, 30 %, -40 %: the median lies between 20 % and 30 %, the 90th percentile 0.7 of the way from
    # the third to the fourth.
    pairs = [pair(10, 11), pair(10, 8), pair(10, 13), pair(10, 6), pair(None, 5), pair(10, None)]
    found = accuracy([run(str(i), p) for i, p in enumerate(pairs)])
    assert found.num_times == 4
    assert found.median_ape_s == pytest.approx(0.25)
    assert found.p90_ape_s == pytest.approx(0.37)
    assert (found.median_ape_memory, found.num_memories) == (None, 0)


def test_an_error_is_relative_to_what_was_measured() -> None:
    assert pair(8, 10).error == pytest.approx(0.25)
    assert pair(None, 10).error is None


def test_tau_by_hand() -> None:
    # Of the six pairs of (1, 2, 3, 4) against (1, 3, 2, 4) five agree and one disagrees.
    assert pooled_tau([[(1, 1), (2, 3), (3, 2), (4, 4)]]) == pytest.approx(4 / 6)
    # Tau-b: one pair is tied on the left, so 5 pairs count there and 6 on the right; all 5 agree.
    assert pooled_tau([[(1, 1), (1, 2), (3, 3), (4, 4)]]) == pytest.approx(5 / 30**0.5)
    assert pooled_tau([[(1, 2), (2, 1)]]) == -1
    assert pooled_tau([[(1, 1)], []]) is None
    assert pooled_tau([[(1, 1), (1, 2)]]) is None


def test_tau_compares_within_groups_alone() -> None:
    groups = [[(1.0, 1.0), (2.0, 2.0)], [(100.0, 0.1), (200.0, 0.2)]]
    assert pooled_tau(groups) == 1
    assert pooled_tau([[*groups[0], *groups[1]]]) == pytest.approx((2 - 4) / 6)


def test_tau_agrees_with_its_definition() -> None:
    rng = random.Random(0)
    points = [(rng.randrange(8), rng.randrange(8)) for _ in range(30)]
    both = [((a > c) - (a < c)) * ((b > d) - (b < d)) for (a, b), (c, d) in itertools.combinations(points, 2)]
    left = sum(a != c for (a, _), (c, _) in itertools.combinations(points, 2))
    right = sum(b != d for (_, b), (_, d) in itertools.combinations(points, 2))
    assert pooled_tau([[(float(a), float(b)) for a, b in points]]) == pytest.approx(sum(both) / (left * right) ** 0.5)


def test_sweeps_rank_seconds_per_work() -> None:
    # The second run takes longer for more tokens: per token it is the faster one, and predicted so.
    rows = [run("a", pair(1, 1)), run("b", pair(2, 2))]
    rows = [rows[0], ValidatedRow("b", "s", quality="A", work=0.1, time_s=pair(2, 11))]
    assert accuracy(rows).kendall_tau == -1
    rows[1] = ValidatedRow("b", "s", quality="A", work=0.1, time_s=pair(2, 9))
    assert accuracy(rows).kendall_tau == 1


def test_labels_and_free_plans_are_counted() -> None:
    rows = [
        run("a", pair(1, 1), is_oom=False, predicted_oom=False, free_s=0.9),
        run("b", pair(1, 1), is_oom=False, predicted_oom=True, free_s=1.1),
        run("c", Pair(), is_oom=True, predicted_oom=True),
        run("d", Pair(), is_oom=True, predicted_oom=False),
        run("e", pair(1, 1)),
    ]
    found = accuracy(rows)
    assert (found.num_labels, found.num_labels_right, found.num_oom, found.num_oom_right) == (4, 2, 2, 1)
    assert (found.num_free, found.num_free_good) == (2, 1)


def test_lines_of_the_summary() -> None:
    rows = (
        ValidatedRow("a", "one", quality="A", time_s=pair(10, 11)),
        ValidatedRow("b", "one", quality="C", time_s=pair(10, 20)),
        ValidatedRow("c", "two", quality="B", kind="ratio", memory_gib=pair(0.5, 0.6)),
        ValidatedRow("d", "one", quality="A", time_s=pair(10, None), skipped="why"),
        ValidatedRow("e", "three", quality="C", skipped="why"),
    )
    found = Validation(rows)
    lines = found.by_source()
    assert list(lines) == ["one", "two (ratio)", "three"]
    assert (lines["one"].num_rows, lines["one"].num_priced) == (2, 1)
    assert lines["one"].median_ape_s == pytest.approx(0.1)
    assert lines["two (ratio)"].median_ape_memory == pytest.approx(0.2)
    assert (lines["three"].num_rows, lines["three"].median_ape_s) == (0, None)
    assert found.overall().num_memories == 0
    assert found.uncertain()["one"].median_ape_s == pytest.approx(1.0)
