"""Clocks of a pipeline's instructions, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from autopar.ir.clocks import ClockedStep, ClockPoint
from autopar.ir.quantity import Quantity
from autopar.ir.serialize import quantity_json
from autopar.report.text import table, wrapped
from autopar.units import format_joules, format_seconds

NOTABLE = 1e-6
"""Relative difference below which the plan's own clocks are the highest."""


def clocks_report(found: ClockedStep) -> str:
    """What lower clocks save at each deadline, and the clocks of every stage at the one asked for."""
    highest = f"{format_seconds(max(found.fastest_s, found.straggler_s))}, {format_joules(found.highest_j)}"
    lines = wrapped("Highest", f"{highest} a step at the highest clocks ({found.num_gpus} GPUs and their hosts)")
    if found.own_s > found.fastest_s * (1 + NOTABLE) or found.own_j < found.highest_j * (1 - NOTABLE):
        own = f"{format_seconds(max(found.own_s, found.straggler_s))}, {format_joules(found.own_j)}"
        lines += wrapped("Own", f"{own} at the plan's own clocks: {1 - found.own_j / found.highest_j:.1%} less")
    lines += _straggler(found)
    chosen = found.chosen
    figures = f"{format_seconds(max(chosen.makespan_s, found.straggler_s))}, {format_joules(chosen.energy_j)}"
    words = f"{figures}: {_saving(found, chosen):.1%} less"
    lines += wrapped("Chosen", f"{words}, within {format_seconds(chosen.deadline_s)}; modelled")
    lines += wrapped("", f"no choice of clocks saves more than {1 - chosen.bound_j / found.highest_j:.1%}")
    rows = [("deadline", "later", "energy", "saved", "gap")]
    for point in found.points:
        later, gap = point.deadline_s / max(found.fastest_s, found.straggler_s) - 1, 1 - point.bound_j / point.energy_j
        rows.append(
            (
                format_seconds(point.deadline_s),
                f"{later:.0%}",
                format_joules(point.energy_j),
                f"{_saving(found, point):.1%}",
                f"{gap:.2%}",
            )
        )
    lines += ["", *table(rows), "", *_stage_table(found)]
    return "\n".join(lines)


def _straggler(found: ClockedStep) -> list[str]:
    """Who is waited for; nothing where nobody is."""
    lines = []
    if found.slow_rank is not None:
        words = f"pipeline rank {found.slow_rank} takes {found.slow_ratio:.3g} times as long as it should"
        lines += wrapped("Straggler", f"{words}, at its highest clocks")
    if found.straggler_s:
        late = f"{found.straggler_s / found.own_s:.3g} times the plan's own step"
        words = f"the step ends no sooner than {format_seconds(found.straggler_s)}, {late}, whatever these clocks are"
        whose = "the straggler's own GPUs stay at their highest clocks and are counted as if they were others"
        lines += wrapped("" if lines else "Straggler", f"{words}; {whose}")
    return lines


def _saving(found: ClockedStep, point: ClockPoint) -> float:
    return 1 - point.energy_j / found.highest_j


def _stage_table(found: ClockedStep) -> list[str]:
    rows = [("rank", "work", "lowest", "median", "highest")]
    for own in found.stages:
        clocks = own.clocks_mhz
        figures = (min(clocks), statistics.median(clocks), max(clocks))
        lowest, median, most = (f"{mhz:.0f} MHz" for mhz in figures)
        rows.append((str(own.stage), own.kind, lowest, median, most))
    return table(rows)


def clocks_json(found: ClockedStep) -> dict[str, Any]:
    """The schedule and the figures; energies are modelled, of GPUs and hosts, without sends between stages."""
    return {
        "num_gpus": found.num_gpus,
        "num_instructions": found.num_instructions,
        "highest_clocks": {
            "step_time_s": _modelled(found.fastest_s, "s", found.time_range),
            "energy_j": _modelled(found.highest_j, "J", found.energy_range),
        },
        "own_clocks": {
            "step_time_s": _modelled(found.own_s, "s", found.time_range),
            "energy_j": _modelled(found.own_j, "J", found.energy_range),
        },
        "straggler": {
            "step_s": found.straggler_s or None,
            "rank": found.slow_rank,
            "ratio": found.slow_ratio,
        },
        "chosen": _point_json(found, found.chosen),
        "stages": [
            {"stage": own.stage, "kind": own.kind, "microbatches": own.microbatches, "clocks_mhz": own.clocks_mhz}
            for own in found.stages
        ],
        "points": _points_json(found, found.points),
    }


def _points_json(found: ClockedStep, points: Sequence[ClockPoint]) -> list[dict[str, Any]]:
    return [_point_json(found, point) for point in points]


def _point_json(found: ClockedStep, point: ClockPoint) -> dict[str, Any]:
    return {
        "deadline_s": point.deadline_s,
        "step_time_s": _modelled(max(point.makespan_s, found.straggler_s), "s", found.time_range),
        "energy_j": _modelled(point.energy_j, "J", found.energy_range),
        "bound_j": point.bound_j,
        "saving": _saving(found, point),
    }


def _modelled(value: float, unit: str, shares: tuple[float, float]) -> dict[str, Any]:
    return quantity_json(Quantity(value, unit, "modelled", value * shares[0], value * shares[1]))
