"""The time-energy frontier as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autopar.ir.plan import Plan
from autopar.ir.serialize import quantity_json
from autopar.report.figure import check_plot, save_figure
from autopar.report.text import WIDTH, table
from autopar.units import format_joules, format_seconds, format_watts

FIGURES = ("step_time_s", "energy_j", "average_power_w", "peak_power_w")
"""Of a prediction, shown of every point."""


def point_words(plan: Plan) -> str:
    """`dp=4 tp=2 pp=2 m=8 1530 MHz`."""
    decisions = plan.decisions
    each = [" ".join(f"{axis.name}={axis.size}" for axis in mesh.axes if axis.size > 1) for mesh in decisions.meshes]
    axes = ["/".join(own or "1" for own in each)] if decisions.stage_meshes else [own for own in each[:1] if own]
    clocks = sorted({stage.clock_hz for stage in decisions.stages} - {0.0})
    locked = [f"{'-'.join(f'{hz / 1e6:.0f}' for hz in clocks)} MHz"] if clocks else []
    policies = sorted({stage.recompute for stage in decisions.stages} - {"none"})
    recompute = ["recompute" if policy == "full" else policy for policy in policies]
    chunks = f"x{decisions.interleave}" if decisions.interleave > 1 else ""
    words = [*axes, f"pp={decisions.num_ranks}{chunks}", f"m={decisions.num_microbatches}", *locked, *recompute]
    return " ".join(words)


def frontier_report(plans: Sequence[Plan], num_dropped: int, complete: bool) -> str:
    """One line per plan; every line fits into 80 columns."""
    rows = [("step time", "energy", "average", "GPUs", "gap", "plan")]
    for plan in plans:
        predicted = plan.predicted
        rows.append(
            (
                format_seconds(predicted.step_time_s.value),
                format_joules(predicted.energy_j.value),
                format_watts(predicted.average_power_w.value),
                str(plan.decisions.num_gpus),
                f"{plan.solver.gap:.2%}",
                point_words(plan),
            )
        )
    width = max(len(row[-1]) for row in rows)
    lines = [line[:WIDTH].rstrip() for line in table([(*row[:-1], row[-1].ljust(width)) for row in rows])]
    one = "1 plan: the fastest is the thriftiest"
    count = one if len(plans) == 1 else f"{len(plans)} plans, none better than another in both"
    lines += ["", count if complete else f"{count}; more may lie between them"]
    if num_dropped:
        left_out = "1 plan" if num_dropped == 1 else f"{num_dropped} plans"
        lines.append(f"{left_out} left out: dominated, or above a limit, when simulated")
    return "\n".join(lines)


def frontier_json(plans: Sequence[Plan], num_dropped: int, complete: bool) -> dict[str, Any]:
    """Predicted figures as quantities, the rest as plain numbers and words."""
    points = [
        {
            **{name: quantity_json(getattr(plan.predicted, name)) for name in FIGURES},
            "num_gpus": plan.decisions.num_gpus,
            "description": point_words(plan),
            "gap": plan.solver.gap,
        }
        for plan in plans
    ]
    return {"points": points, "num_dropped": num_dropped, "complete": complete}


def plot_frontier(plans: Sequence[Plan], title: str, path: str | Path) -> None:
    """Draw energy over step time as a staircase, points coloured by number of GPUs; the suffix names the format.

    Raises:
        InputError: the file cannot be written in that format.
    """
    check_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    times = [plan.predicted.step_time_s.value for plan in plans]
    joules = [plan.predicted.energy_j.value for plan in plans]
    axes.step(times, joules, where="post", color="0.7", linewidth=1, zorder=1)
    for count in sorted({plan.decisions.num_gpus for plan in plans}):
        own = [i for i, plan in enumerate(plans) if plan.decisions.num_gpus == count]
        label = f"{count} GPU{'s' * (count > 1)}"
        axes.scatter([times[i] for i in own], [joules[i] for i in own], s=24, label=label, zorder=2)
    axes.set_xlabel("step time, s (predicted)")
    axes.set_ylabel("energy per step, J (predicted, GPUs and hosts)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
