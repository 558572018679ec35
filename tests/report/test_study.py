"""Figures of a study: labels of what was read and of what was modelled, ratios to serial, break-even."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost.hardware import load_cluster
from autopar.cost.sync import Exchanged, price_sync, work_of
from autopar.ir.quantity import Quantity
from autopar.ir.study import Study, StudyCase
from autopar.ir.sync import SyncRun, parse_policy
from autopar.report.study import PRICED, RUN, study_json, study_report

CLUSTER = load_cluster("cpu", 16)
WHAT = Exchanged([(256, 256)], 4)
READ = Quantity(3.0, "J", "measured", 2.9, 3.1)


def case(text: str, workers: int, energy: Quantity | None, seconds: float) -> StudyCase:
    policy = parse_policy(text)
    price = price_sync(CLUSTER, policy, WHAT, work_of(CLUSTER, 0.1 / workers), workers)
    time = Quantity(seconds, "s", "measured", 0.9 * seconds, 1.2 * seconds)
    note = "energy covers: package" if energy is not None else "energy unknown: no RAPL counter on this machine"
    run = SyncRun(policy, workers, time, energy, (2.0, 1.0), {0: 3, workers - 1: 5}, (note,))
    return StudyCase(policy, workers, price, run)


def study(energy: Quantity | None) -> Study:
    cases = (case("all-reduce", 1, energy, 0.1), case("all-reduce", 2, energy, 0.06), case("ps-async", 3, energy, 0.05))
    return Study("m", "cpu", 12, cases)


def test_energy_that_was_read_is_measured_and_power_follows() -> None:
    for found in study_json(study(READ))["cases"]:
        measured = found["measured"]
        assert measured["energy_j"] == {"value": 3.0, "unit": "J", "label": "measured", "low": 2.9, "high": 3.1}
        assert measured["average_power_w"]["label"] == "measured"
        assert measured["average_power_w"]["value"] == pytest.approx(3.0 / measured["step_time_s"]["value"])


def test_energy_that_was_not_read_is_modelled_at_the_time_measured() -> None:
    found = study(None)
    for own, content in zip(found.cases, study_json(found)["cases"], strict=True):
        assert own.price is not None
        assert own.run is not None
        measured = content["measured"]
        expected = own.price.dynamic_j + own.price.fixed_w * own.run.step_time.value
        assert measured["energy_j"]["value"] == pytest.approx(expected)
        assert measured["energy_j"]["label"] == measured["average_power_w"]["label"] == "modelled"
        assert measured["energy_j"]["low"] < measured["energy_j"]["value"] < measured["energy_j"]["high"]
    text = " ".join(study_report(found).split())
    assert "no counter can be read" in text
    assert "energy unknown: no RAPL counter" in text


def test_nothing_is_said_to_be_modelled_where_all_was_read() -> None:
    text = study_report(study(READ))
    run = text[text.index("Measured on this machine") :]
    assert "modelled" not in run
    assert "3 by 0, 5 by 2 (mean 1.2)" in " ".join(run.split())
    assert max(map(len, text.splitlines())) <= 80


def test_break_even_counts_serial_among_the_numbers_of_workers() -> None:
    found = study(None)
    policy = parse_policy("all-reduce")
    for figures in (PRICED, RUN):
        even, (one, two) = found.break_even(policy, figures), (figures(own) for own in found.cases[:2])
        assert even is not None
        assert one is not None
        assert two is not None
        assert even.least_energy == (2 if two[1] < one[1] else 1)
        assert even.cheaper_up_to == (2 if two[1] < one[1] else None)
    without = replace(found, cases=found.cases[1:])
    assert without.serial is None
    assert without.break_even(policy, PRICED) is None
    assert study_json(without)["cases"][0]["predicted"]["speedup"] is None
