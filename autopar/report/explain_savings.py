"""The savings of a plan against the plan of least time, as a table and as JSON."""

from __future__ import annotations

from typing import Any

from autopar.ir.savings import Savings, SavingStep
from autopar.ir.serialize import quantity_json
from autopar.report.page_html import Markup, definitions, section
from autopar.report.page_html import table as page_table
from autopar.report.text import table, wrapped
from autopar.units import format_joules, format_seconds


def savings_report(found: Savings) -> list[str]:
    """One line per step of the way, then what clocks alone save; shares are of the energy of the plan of least time."""
    first = found.fastest
    rows = [("", "GPUs", "step time", "energy", "saved"), _row(found, first, "")]
    rows += [_row(found, step) for step in found.steps]
    rows.append(("together", "", "", "", _share(found, found.saved_j)))
    title = (
        f"Energy against the plan of least time, by what the objective {found.objective} was free to choose (modelled)"
    )
    lines = [*wrapped("Savings", title), *table([(f"{row[0]:<34}", *row[1:]) for row in rows])]
    for step in (first, *found.steps):
        lines += wrapped("", f"{step.cause}: {step.description or step.reason}")
    beside = [] if found.beyond is None else [_row(found, found.beyond)]
    beside += [_row(found, step) for step in found.alone]
    if beside:
        words = "a clock for every forward and backward (autopar clocks): on top of the plan, or all that is changed"
        lines += ["", *wrapped("Beside", words), *table([(f"{row[0]:<34}", *row[1:]) for row in beside])]
    for remark in found.remarks:
        lines += wrapped("Note", remark)
    return lines


def _row(found: Savings, step: SavingStep, share: str | None = None) -> tuple[str, str, str, str, str]:
    if step.step_time_s is None or step.energy_j is None:
        return step.cause, str(step.num_gpus), "-", "-", "-"
    saved = _share(found, step.saved_j) if share is None else share
    figures = format_seconds(step.step_time_s.value), format_joules(step.energy_j.value)
    return step.cause, str(step.num_gpus), *figures, saved


def _share(found: Savings, saved_j: float) -> str:
    if found.fastest.energy_j is None:
        raise AssertionError("the plan of least time has figures")
    return f"{round(saved_j / found.fastest.energy_j.value, 3) + 0.0:.1%}"


def savings_section(found: Savings) -> Markup:
    """The same for the page."""
    heading = ("", "GPUs", "step time", "energy", "saved")
    rows = [_row(found, found.fastest, ""), *(_row(found, step) for step in found.steps)]
    rows.append(("together", "", "", "", _share(found, found.saved_j)))
    beside = [_row(found, step) for step in (*([found.beyond] if found.beyond else []), *found.alone)]
    plans = [(step.cause, step.description or step.reason) for step in (found.fastest, *found.steps)]
    caption = "With a clock for every forward and backward: on top of the plan, or all that is changed"
    return section(
        "Savings",
        f"Energy against the plan of least time, by what the objective {found.objective} was free to choose; modelled.",
        page_table("From the plan of least time to this one", heading, rows),
        definitions(plans),
        *([page_table(caption, heading, beside)] if beside else []),
        *([definitions([("Note", remark) for remark in found.remarks])] if found.remarks else []),
    )


def savings_json(found: Savings) -> dict[str, Any]:
    """Figures as quantities; `saved_j` is against the step before, of `alone` against the plan of least time."""
    return {
        "objective": found.objective,
        "fastest": _step_json(found.fastest),
        "steps": [_step_json(step) for step in found.steps],
        "saved_j": found.saved_j,
        "beyond": None if found.beyond is None else _step_json(found.beyond),
        "alone": [_step_json(step) for step in found.alone],
        "remarks": list(found.remarks),
    }


def _step_json(step: SavingStep) -> dict[str, Any]:
    return {
        "cause": step.cause,
        "description": step.description,
        "num_gpus": step.num_gpus,
        "step_time_s": None if step.step_time_s is None else quantity_json(step.step_time_s),
        "energy_j": None if step.energy_j is None else quantity_json(step.energy_j),
        "saved_j": step.saved_j,
        "reason": step.reason,
    }
