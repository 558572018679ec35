"""Break-even of energy against its closed form, where parallel work saves energy and where it does not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autopar.ir.mesh import stage_mesh
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.report.sweep import best_counts, cheaper_up_to, rows_of, sweep_json
from tests.planner.plans import tiny_plan

SERIAL_S, ACTIVE_W, BLOCKED_W = 100.0, 300.0, 80.0
COUNTS = range(1, 65)


def amdahl(serial_share: float, shared_w: float) -> tuple[Plan, ...]:
    """Plans on 1 to 64 GPUs: a share of the work is serial, and the host's power is shared.

    T(N) = T1 (s + (1 - s) / N);  E(N) = T1 (s (Ps + Pa + (N - 1) Pb) + (1 - s) / N (Ps + N Pa)).
    """
    found = []
    for n in COUNTS:
        time_s = SERIAL_S * (serial_share + (1 - serial_share) / n)
        alone_w, together_w = shared_w + ACTIVE_W + (n - 1) * BLOCKED_W, shared_w + n * ACTIVE_W
        energy_j = SERIAL_S * (serial_share * alone_w + (1 - serial_share) / n * together_w)
        found.append(plan_of(n, time_s, energy_j))
    return tuple(found)


def plan_of(num_gpus: int, time_s: float, energy_j: float) -> Plan:
    plan = tiny_plan()
    predicted = replace(
        plan.predicted,
        step_time_s=Quantity(time_s, "s", "modelled", time_s, time_s),
        energy_j=Quantity(energy_j, "J", "modelled", energy_j, energy_j),
    )
    decisions = replace(plan.decisions, mesh=stage_mesh(num_gpus, 1), stages=plan.decisions.stages[:1])
    return replace(plan, predicted=predicted, decisions=decisions)


@pytest.mark.parametrize(("serial_share", "shared_w"), [(0.05, 1000.0), (0.1, 410.0), (0.02, 500.0), (0.2, 510.0)])
def test_the_minimum_and_the_break_even_are_those_of_the_closed_form(serial_share: float, shared_w: float) -> None:
    plans = amdahl(serial_share, shared_w)
    best = math.sqrt((1 - serial_share) * shared_w / (serial_share * BLOCKED_W))
    assert abs(best_counts(plans)["energy"] - best) < 1
    even = best**2
    expected = max((n for n in COUNTS if 1 < n < even), default=None)
    assert cheaper_up_to(plans) == expected
    assert sweep_json(plans, ())["less_energy_than_base_up_to"] == expected
    assert 1 < best_counts(plans)["energy"] < 64


def test_without_shared_power_every_further_gpu_costs_energy() -> None:
    plans = amdahl(0.05, 0.0)
    assert cheaper_up_to(plans) is None
    assert best_counts(plans)["energy"] == 1
    ratios = [row.energy_ratio for row in rows_of(plans)]
    assert ratios == sorted(ratios)
    assert all(row.marginal_j_per_s is None or row.marginal_j_per_s > 0 for row in rows_of(plans))


def test_the_energy_ratio_is_that_of_power_over_efficiency() -> None:
    plans = amdahl(0.05, 1000.0)
    base = plans[0].predicted
    for row in rows_of(plans):
        own, n = row.plan.predicted, row.plan.decisions.num_gpus
        power = own.energy_j.value / own.step_time_s.value / n
        base_power = base.energy_j.value / base.step_time_s.value
        assert row.energy_ratio == pytest.approx(power / base_power / row.efficiency)
