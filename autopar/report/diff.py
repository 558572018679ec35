"""What two plans decide differently, and what that costs.

Ops and parameters are grouped by name with its numbers left out, so that the same op of all layers is one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from autopar.ir.plan import Plan
from autopar.report.frontier import point_words
from autopar.report.text import WIDTH, limits_words, passes_words, table, wrapped
from autopar.units import format_bytes, format_joules, format_seconds, format_watts

MOST_LINES = 20


def diff_report(first: Plan, second: Plan, names: tuple[str, str]) -> str:
    """The whole comparison in words."""
    rows = [("", names[0][-24:], names[1][-24:], "ratio")]
    figures = (format_seconds, format_joules, format_watts, format_watts, format_bytes)
    for show, (name, (a, b)) in zip(figures, _figures(first, second).items(), strict=True):
        rows.append((name.rpartition("_")[0].replace("_", " "), show(a), show(b), f"{b / a:.3f}" if a else "-"))
    parts = [table(rows)]
    changed = [wrapped(name, f"{a}  ->  {b}") for name, (a, b) in _settings(first, second).items() if a != b]
    parts += [[line for lines in changed for line in lines]] if changed else []
    for kind in ("ops", "parameters"):
        changes = _changes(first, second, kind)
        if changes:
            parts.append(_lines(kind, changes))
    if len(parts) == 1:
        parts.append(["The plans decide the same."])
    return "\n\n".join("\n".join(part) for part in parts)


def diff_json(first: Plan, second: Plan) -> dict[str, Any]:
    """The same as values: pairs of first and second plan."""
    return {
        "figures": {name: list(pair) for name, pair in _figures(first, second).items()},
        "settings": {name: list(pair) for name, pair in _settings(first, second).items() if pair[0] != pair[1]},
        **{
            kind: [
                {"names": name, "from": a, "to": b, "count": count}
                for (name, a, b), count in sorted(_changes(first, second, kind).items())
            ]
            for kind in ("ops", "parameters")
        },
    }


def _figures(first: Plan, second: Plan) -> dict[str, tuple[float, float]]:
    def pair(name: str) -> tuple[float, float]:
        return getattr(first.predicted, name).value, getattr(second.predicted, name).value

    peaks = tuple(max(q.value for q in plan.predicted.peak_memory_bytes) for plan in (first, second))
    named = {name: pair(name) for name in ("step_time_s", "energy_j", "average_power_w", "peak_power_w")}
    return {**named, "peak_memory_bytes": (peaks[0], peaks[1])}


def _settings(first: Plan, second: Plan) -> dict[str, tuple[str, str]]:
    def words(plan: Plan) -> dict[str, str]:
        decisions = plan.decisions
        return {
            "Model": f"{plan.model.source}, batch {plan.model.batch_size}, graph {plan.model.graph_hash[:12]}",
            "Planned for": f"{plan.cluster.num_gpus} x {plan.cluster.gpu}",
            "Objective": plan.objective.kind,
            "Limits": limits_words(plan) or "none",
            "Decision": f"{decisions.num_gpus} GPUs, {point_words(plan)}, {decisions.schedule}",
            "Stages": " ".join(f"{s.start}-{s.stop - 1}" for s in decisions.stages),
            "Passes": "; ".join(passes_words(plan)) or "none",
            "Offload": decisions.offload.words or "nothing",
            "Pace": format_seconds(decisions.pace_s) if decisions.pace_s else "none",
        }

    mine, other = words(first), words(second)
    return {name: (mine[name], other[name]) for name in mine}


def _changes(first: Plan, second: Plan, kind: str) -> Counter[tuple[str, str, str]]:
    """(class of names, labels in the first, labels in the second) -> how many; only what differs."""
    mine, other = _labels(first, kind), _labels(second, kind)
    found = Counter[tuple[str, str, str]]()
    for name in sorted(mine.keys() | other.keys()):
        a, b = mine.get(name, "absent"), other.get(name, "absent")
        if a != b:
            found[re.sub(r"\d+", "*", name), a, b] += 1
    return found


def _labels(plan: Plan, kind: str) -> dict[str, str]:
    """`dp batch, tp columns` of every op or parameter, over axes longer than one."""
    axes = plan.decisions.extent.axes
    chosen: Mapping[str, Any] = plan.decisions.ops if kind == "ops" else plan.decisions.parameters
    return {
        name: ", ".join(f"{axis.name} {own.label}" for axis, own in zip(axes, strategy, strict=True) if axis.size > 1)
        or "whole"
        for name, strategy in chosen.items()
    }


def _lines(kind: str, changes: Counter[tuple[str, str, str]]) -> list[str]:
    lines = [f"{sum(changes.values())} {kind} differ (* stands for numbers)"]
    for (name, a, b), count in sorted(changes.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_LINES]:
        lines.append(f"  {count} x {name}: {a} -> {b}"[:WIDTH])
    if len(changes) > MOST_LINES:
        lines.append(f"  and {len(changes) - MOST_LINES} more kinds")
    return lines
