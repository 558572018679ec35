"""A study of policies as text, as JSON and as a picture: predicted and, where it was run, measured figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.serialize import quantity_json
from autopar.ir.study import Figures, Study, StudyCase, is_alone
from autopar.ir.sync import SyncRun
from autopar.report.figure import check_plot, save_figure
from autopar.report.text import WIDTH, table, wrapped
from autopar.units import KIB, format_joules, format_seconds, format_watts

PRICED: Figures = lambda case: case.priced_figures  # noqa: E731
RUN: Figures = lambda case: case.run_figures  # noqa: E731
HEADING = ("policy", "W", "time", "energy", "power", "x", "E/E1")


def study_report(study: Study) -> str:
    """Every line fits into 80 columns."""
    parts = [wrapped("Study", f"{study.title}, {study.batch_size} samples a step")]
    priced = [case for case in study.cases if case.price is not None]
    run = [case for case in study.cases if case.run is not None]
    if priced:
        parts.append(_priced_table(study, priced))
        parts.append(_break_even(study, PRICED, "predicted"))
    if run:
        parts.append(_run_table(study, run))
        parts.append(_break_even(study, RUN, "of the runs"))
    parts.append([line for note in _notes(study) for line in wrapped("Note", note)])
    return "\n\n".join("\n".join(part) for part in parts if part)


def _priced_table(study: Study, cases: Iterable[StudyCase]) -> list[str]:
    rows: list[tuple[str, ...]] = [(*HEADING, "sent", "late")]
    for case in _told_once(cases):
        price = case.price
        assert price is not None
        figures = (price.step_time_s.value, price.energy_j.value, price.average_power_w.value)
        rows.append((*_cells(study, case, PRICED, figures), f"{price.sent_bytes / KIB:.4g}", f"{price.staleness:g}"))
    words = (
        "W: workers, +1 a server; power: average; x: speed-up, E/E1: energy over that of serial; sent: KiB by a "
        "worker; late: updates by others between reading parameters and applying the gradient"
    )
    return ["Predicted (modelled), of a step of all processes and hosts", *_lines(rows), *wrapped("", words)]


def _run_table(study: Study, cases: Sequence[StudyCase]) -> list[str]:
    rows: list[tuple[str, ...]] = [(*HEADING, "energy is", "loss")]
    for case in _told_once(cases):
        run, energy, power = case.run, case.run_energy, case.run_power
        assert run is not None
        label = "unknown" if energy is None else energy.label
        figures = (run.step_time.value, energy.value if energy else None, power.value if power else None)
        cells = _cells(study, case, RUN, figures)
        rows.append((*cells, label, f"{run.losses[-1]:.3g}"))
    lines = ["Measured on this machine, of a step; loss: of the last, mean over workers", *_lines(rows)]
    for case in cases:
        if case.run is not None and set(case.run.staleness) != {0}:
            lines += wrapped("Late", f"{case.policy} on {_workers(case.num_workers)}: {late_words(case.run)}")
    return lines


def late_words(run: SyncRun) -> str:
    """How many gradients were how stale."""
    counts = ", ".join(f"{count} by {late}" for late, count in run.staleness.items())
    return f"gradients late by so many updates of others: {counts} (mean {run.mean_staleness:.2g})"


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"


def _told_once(cases: Iterable[StudyCase]) -> list[StudyCase]:
    """One worker without a server is serial under every policy."""
    found, has_serial = [], False
    for case in cases:
        is_serial = is_alone(case)
        if not (is_serial and has_serial):
            found.append(case)
        has_serial = has_serial or is_serial
    return found


def _cells(
    study: Study, case: StudyCase, figures: Figures, shown: tuple[float, float | None, float | None]
) -> tuple[str, ...]:
    time_s, energy_j, power_w = shown
    against = study.against_serial(case, figures)
    return (
        "serial" if is_alone(case) else str(case.policy),
        f"{case.num_workers}+1" if case.policy.has_server else str(case.num_workers),
        format_seconds(time_s),
        "unknown" if energy_j is None else format_joules(energy_j),
        "unknown" if power_w is None else format_watts(power_w),
        "-" if against is None else f"{against[0]:.2f}",
        "-" if against is None else f"{against[1]:.2f}",
    )


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with its first column to the left and narrow gaps."""
    width = max(len(row[0]) for row in rows)
    return [line[:WIDTH].rstrip() for line in table([(row[0].ljust(width), *row[1:]) for row in rows], " ")]


def _break_even(study: Study, figures: Figures, name: str) -> list[str]:
    found = [study.break_even(policy, figures) for policy in study.policies]
    rows = [
        (
            str(own.policy),
            str(own.least_energy),
            "-" if own.cheaper_up_to is None else str(own.cheaper_up_to),
            str(own.fastest),
        )
        for own in found
        if own is not None
    ]
    if not rows:
        return []
    heading = ("policy", "least energy at", "less than serial up to", "fastest at")
    return [f"Break-even, {name}: workers", *_lines([heading, *rows])]


def _notes(study: Study) -> list[str]:
    found = list(study.notes)
    if any(case.run is not None and case.run.energy is None for case in study.cases):
        found.append(
            "energy and power of steps that were run are modelled, with the device's powers at the time measured, "
            "where no counter can be read"
        )
    for case in study.cases:
        if case.run is not None:
            found += case.run.notes
    left_out: dict[str, list[int]] = {}
    for case in study.cases:
        for what, reason in (("not priced", case.reason), ("not run", case.not_run)):
            if reason:
                left_out.setdefault(f"{what}: {reason}", []).append(case.num_workers)
    for reason, counts in left_out.items():
        found.append(f"{', '.join(map(str, dict.fromkeys(counts)))} workers {reason}")
    return list(dict.fromkeys(found))


def study_json(study: Study) -> dict[str, Any]:
    """Quantities as everywhere; seconds, joules, watts and bytes of a step; None where there is nothing."""
    return {
        "title": study.title,
        "device": study.device,
        "batch_size": study.batch_size,
        "cases": [_case_json(study, case) for case in study.cases],
        "break_even": {"predicted": _break_even_json(study, PRICED), "measured": _break_even_json(study, RUN)},
        "notes": list(study.notes),
    }


def _case_json(study: Study, case: StudyCase) -> dict[str, Any]:
    return {
        "policy": str(case.policy),
        "num_workers": case.num_workers,
        "num_processes": case.num_processes,
        "predicted": _priced_json(study, case),
        "measured": _run_json(study, case),
        "reason": case.reason or None,
        "not_run": case.not_run or None,
    }


def _priced_json(study: Study, case: StudyCase) -> dict[str, Any] | None:
    price = case.price
    if price is None:
        return None
    return {
        "step_time_s": quantity_json(price.step_time_s),
        "energy_j": quantity_json(price.energy_j),
        "average_power_w": quantity_json(price.average_power_w),
        "compute_s": price.compute_s,
        "exchange_s": price.exchange_s,
        "sent_bytes": price.sent_bytes,
        "staleness": price.staleness,
        "steps_apart": case.policy.local_steps - 1,
        **_ratios_json(study, case, PRICED),
    }


def _run_json(study: Study, case: StudyCase) -> dict[str, Any] | None:
    run, energy, power = case.run, case.run_energy, case.run_power
    if run is None:
        return None
    return {
        "step_time_s": quantity_json(run.step_time),
        "energy_j": None if energy is None else quantity_json(energy),
        "average_power_w": None if power is None else quantity_json(power),
        "losses": list(run.losses),
        "staleness": {str(late): count for late, count in run.staleness.items()},
        "mean_staleness": run.mean_staleness,
        "notes": list(run.notes),
        **_ratios_json(study, case, RUN),
    }


def _ratios_json(study: Study, case: StudyCase, figures: Figures) -> dict[str, Any]:
    against = study.against_serial(case, figures)
    return {"speedup": against and against[0], "energy_ratio": against and against[1]}


def _break_even_json(study: Study, figures: Figures) -> list[dict[str, Any]]:
    found = [(policy, study.break_even(policy, figures)) for policy in study.policies]
    return [
        {
            "policy": str(policy),
            "least_energy_workers": own.least_energy,
            "cheaper_than_serial_up_to": own.cheaper_up_to,
            "fastest_workers": own.fastest,
        }
        for policy, own in found
        if own is not None
    ]


def plot_study(study: Study, path: str | Path) -> None:
    """Draw time and energy over the number of workers, one colour per policy: lines predicted, crosses measured.

    Raises:
        InputError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    check_plot()
    if not any(case.price is not None or case.run is not None for case in study.cases):
        raise InputError("nothing to draw: no case has figures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    counts = sorted({case.num_workers for case in study.cases})
    for which, (axes, words) in enumerate(
        zip(figure.subplots(1, 2), ("time of a step, s", "energy of a step, J (all processes, hosts)"), strict=True)
    ):
        for index, policy in enumerate(study.policies):
            own = [case for case in study.cases if case.policy == policy]
            priced, run = _points(own, PRICED, which), _points(own, RUN, which)
            axes.plot(*priced, "-o", color=f"C{index}", label=str(policy), markersize=4)
            axes.plot(*run, "x", color=f"C{index}", markersize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("workers")
        axes.set_ylabel(words)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{study.title}: line predicted, cross run here", fontsize=10)
    save_figure(figure, path)


def _points(cases: Iterable[StudyCase], figures: Figures, which: int) -> tuple[list[int], list[float]]:
    """Numbers of workers, and seconds (0) or joules (1) of the cases that have them."""
    known = [(case.num_workers, found[which]) for case in cases if (found := figures(case)) is not None]
    return [count for count, _ in known], [value for _, value in known]
