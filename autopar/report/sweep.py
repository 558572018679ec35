"""The break-even curve: time, energy and power over the number of GPUs, as a table, as JSON and as a picture.

Speed-up is the base's time over this one's (the base is the fewest GPUs that have a plan), efficiency is speed-up over
the ratio of GPUs. The marginal price of a second is what the step to this number of GPUs from the one before costs:
joules more per second less. Energy breaks even at the most GPUs that take less of it than the base. Where plans were
run on this machine, what was measured stands beside what was predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.measured import MeasuredStep
from autopar.ir.plan import Plan
from autopar.ir.serialize import quantity_json
from autopar.report.figure import check_plot, save_figure
from autopar.report.frontier import FIGURES, point_words
from autopar.report.text import WIDTH, table, wrapped
from autopar.units import format_joules, format_seconds, format_watts


@dataclass(frozen=True)
class Row:
    """Derived figures of one plan; `marginal_j_per_s` is None for the first, and where no second is saved."""

    plan: Plan
    speedup: float
    efficiency: float
    energy_ratio: float
    marginal_j_per_s: float | None


@dataclass(frozen=True)
class Runs:
    """What was run of a sweep, by number of GPUs, and (number of GPUs, why not) of what was to be run and was not."""

    steps: Mapping[int, MeasuredStep] = field(default_factory=dict)
    left_out: Sequence[tuple[int, str]] = ()

    def speedup(self, num_gpus: int) -> float | None:
        """Over the fewest GPUs that were run."""
        own = self.steps.get(num_gpus)
        return None if own is None else self.steps[min(self.steps)].step_time_s.value / own.step_time_s.value

    @property
    def notes(self) -> tuple[str, ...]:
        """Of all runs, each once."""
        return tuple(dict.fromkeys(note for step in self.steps.values() for note in step.notes))


NOTHING_RUN = Runs()


def rows_of(plans: Sequence[Plan]) -> tuple[Row, ...]:
    """One row per plan, which come by rising number of GPUs."""
    found: list[Row] = []
    for i, plan in enumerate(plans):
        base, before = plans[0], plans[i - 1] if i else None
        speedup = _time_s(base) / _time_s(plan)
        ratio = plan.decisions.num_gpus / base.decisions.num_gpus
        saved_s = 0.0 if before is None else _time_s(before) - _time_s(plan)
        marginal = (_energy_j(plan) - _energy_j(before)) / saved_s if before is not None and saved_s > 0 else None
        found.append(Row(plan, speedup, speedup / ratio, _energy_j(plan) / _energy_j(base), marginal))
    return tuple(found)


def cheaper_up_to(plans: Sequence[Plan]) -> int | None:
    """The most GPUs that take less energy than the base; None where none do."""
    return max((row.plan.decisions.num_gpus for row in rows_of(plans) if row.energy_ratio < 1), default=None)


def best_counts(plans: Sequence[Plan]) -> dict[str, int]:
    """Number of GPUs at the least of each figure; the smallest of equals."""
    figures: dict[str, Callable[[Plan], float]] = {
        "time": _time_s,
        "energy": _energy_j,
        "energy x delay": lambda plan: _time_s(plan) * _energy_j(plan),
    }
    if plans and plans[0].objective.kind in ("cost", "carbon"):
        figures[plans[0].objective.kind] = _cost
    return {
        name: min(plans, key=lambda plan: (value(plan), plan.decisions.num_gpus)).decisions.num_gpus
        for name, value in figures.items()
        if plans
    }


def sweep_report(plans: Sequence[Plan], missing: Sequence[tuple[int, str]], runs: Runs = NOTHING_RUN) -> str:
    """The table and the break-even points; `missing` are (number of GPUs, why there is no plan)."""
    lines: list[str] = []
    if plans:
        rows = [("GPUs", "step time", "energy", "E/E1", "average", "peak", "speed-up", "eff.", "J per s saved")]
        for row in rows_of(plans):
            predicted, marginal = row.plan.predicted, row.marginal_j_per_s
            rows.append(
                (
                    str(row.plan.decisions.num_gpus),
                    format_seconds(predicted.step_time_s.value),
                    format_joules(predicted.energy_j.value),
                    f"{row.energy_ratio:.2f}",
                    format_watts(predicted.average_power_w.value),
                    format_watts(predicted.peak_power_w.value),
                    f"{row.speedup:.2f}",
                    f"{row.efficiency:.0%}",
                    "-" if marginal is None else f"{marginal:.4g}",
                )
            )
        lines += [line[:WIDTH].rstrip() for line in table(rows, " ")]
        lines.append("")
        lines += [f"{plan.decisions.num_gpus:>6}  {point_words(plan)}"[:WIDTH] for plan in plans]
        lines.append("")
        least = ", ".join(f"{name} {count}" for name, count in best_counts(plans).items())
        lines += wrapped("Least at", f"{least} GPUs (all figures modelled; GPUs and hosts)")
        labels = sorted({plan.predicted.step_time_s.label for plan in plans})
        base, most = plans[0].decisions.num_gpus, cheaper_up_to(plans)
        less = "no number takes" if most is None else f"up to {most} take"
        lines += wrapped("Break-even", f"{less} less energy than {base}")
        lines += wrapped("Base", f"{_gpus(base)} for speed-up, efficiency and E/E1; {', '.join(labels)}")
    for count, reason in missing:
        lines += wrapped(_gpus(count), f"no plan: {reason}")
    lines += _measured_lines(plans, runs)
    return "\n".join(lines)


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _measured_lines(plans: Sequence[Plan], runs: Runs) -> list[str]:
    """The table of what was run, predicted figures beside it."""
    lines: list[str] = []
    if runs.steps:
        heading = ("GPUs", "predicted", "run", "x", "predicted", "run", "energy is", "predicted", "run")
        rows = [heading, *(_measured_row(plan, runs) for plan in plans if plan.decisions.num_gpus in runs.steps)]
        lines += ["", "Run on this machine: time of a step, speed-up (x), energy, average power"]
        lines += [line[:WIDTH].rstrip() for line in table(rows, " ")]
    for note in runs.notes:
        lines += wrapped("Note", note)
    for count, reason in runs.left_out:
        lines += wrapped(_gpus(count), f"not run: {reason}")
    return lines


def _measured_row(plan: Plan, runs: Runs) -> tuple[str, ...]:
    predicted, count = plan.predicted, plan.decisions.num_gpus
    own, speedup = runs.steps[count], runs.speedup(count)
    return (
        str(count),
        format_seconds(predicted.step_time_s.value),
        format_seconds(own.step_time_s.value),
        "-" if speedup is None else f"{speedup:.2f}",
        format_joules(predicted.energy_j.value),
        format_joules(own.energy_j.value),
        own.energy_j.label,
        format_watts(predicted.average_power_w.value),
        format_watts(own.average_power_w.value),
    )


def sweep_json(plans: Sequence[Plan], missing: Sequence[tuple[int, str]], runs: Runs = NOTHING_RUN) -> dict[str, Any]:
    """Quantities as everywhere; derived ratios are plain numbers. `measured` is None for plans that were not run."""
    points = [
        {
            "num_gpus": row.plan.decisions.num_gpus,
            **{name: quantity_json(getattr(row.plan.predicted, name)) for name in FIGURES},
            "speedup": row.speedup,
            "efficiency": row.efficiency,
            "energy_ratio": row.energy_ratio,
            "marginal_j_per_s": row.marginal_j_per_s,
            "description": point_words(row.plan),
            "gap": row.plan.solver.gap,
            "measured": _measured_json(row.plan.decisions.num_gpus, runs),
        }
        for row in rows_of(plans)
    ]
    without = [{"num_gpus": count, "reason": reason} for count, reason in missing]
    left_out = [{"num_gpus": count, "reason": reason} for count, reason in runs.left_out]
    return {
        "points": points,
        "infeasible": without,
        "not_measured": left_out,
        "least_at": best_counts(plans),
        "less_energy_than_base_up_to": cheaper_up_to(plans),
    }


def _measured_json(num_gpus: int, runs: Runs) -> dict[str, Any] | None:
    own = runs.steps.get(num_gpus)
    if own is None:
        return None
    return {
        "num_processes": own.num_processes,
        "num_steps": own.num_steps,
        "step_time_s": quantity_json(own.step_time_s),
        "energy_j": quantity_json(own.energy_j),
        "average_power_w": quantity_json(own.average_power_w),
        "speedup": runs.speedup(num_gpus),
        "notes": list(own.notes),
    }


def plot_sweep(plans: Sequence[Plan], title: str, path: str | Path, runs: Runs = NOTHING_RUN) -> None:
    """Draw time and energy over the number of GPUs, crosses where plans were run; the suffix names the format.

    Raises:
        InputError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    check_plot()
    if not plans:
        raise InputError("nothing to draw: no number of GPUs has a plan")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    time_axes = figure.subplots()
    energy_axes = time_axes.twinx()
    counts = [plan.decisions.num_gpus for plan in plans]
    time_axes.plot(counts, [_time_s(plan) for plan in plans], "o-", color="tab:blue")
    energy_axes.plot(counts, [_energy_j(plan) for plan in plans], "s--", color="tab:red")
    if runs.steps:
        known = sorted(runs.steps.items())
        labels = ", ".join(sorted({own.energy_j.label for _, own in known}))
        times, joules = [own.step_time_s.value for _, own in known], [own.energy_j.value for _, own in known]
        time_axes.plot([n for n, _ in known], times, "x", color="tab:blue", label="time, measured", markersize=9)
        energy_axes.plot(
            [n for n, _ in known], joules, "+", color="tab:red", label=f"energy of runs, {labels}", markersize=9
        )
        figure.legend(loc="outside lower center", ncols=2)
    least = best_counts(plans)["energy"]
    energy_axes.axvline(least, color="0.6", linewidth=1, linestyle=":")
    time_axes.set_xscale("log", base=2)
    time_axes.set_yscale("log")
    time_axes.set_xticks(counts, [str(count) for count in counts])
    time_axes.set_xlabel(f"GPUs (least energy at {least})")
    time_axes.set_ylabel("step time, s (predicted)", color="tab:blue")
    energy_axes.set_ylabel("energy per step, J (predicted, GPUs and hosts)", color="tab:red")
    time_axes.set_title(title)
    save_figure(figure, path)


def _time_s(plan: Plan) -> float:
    return plan.predicted.step_time_s.value


def _energy_j(plan: Plan) -> float:
    return plan.predicted.energy_j.value


def _cost(plan: Plan) -> float:
    return plan.objective.value(_time_s(plan), _energy_j(plan), plan.decisions.num_gpus)
