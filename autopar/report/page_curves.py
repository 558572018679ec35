"""The time-energy frontier, and time and energy over the number of GPUs, each as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopar.ir.measured import MeasuredStep
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.report.frontier import point_words
from autopar.report.page_html import Markup, definitions, joined, page, section, table, tag
from autopar.report.page_parts import quantity_cell
from autopar.report.page_svg import Scale, Series, key, linear_scale, log_scale, plot
from autopar.report.sweep import NOTHING_RUN, Runs, best_counts, rows_of
from autopar.report.text import header_words
from autopar.units import format_bytes, format_joules, format_seconds, format_watts

HEADING = ("label", "step time", "energy", "average power", "peak power", "memory", "gap", "plan")
COLOURS = ("k0", "k4", "k2", "k3", "k5", "k1", "k8", "k7")
"""Of points, by number of GPUs."""
SCOPE = "Energy and power are those of the GPUs used and their hosts."


def frontier_page(plans: Sequence[Plan], num_dropped: int, complete: bool, title: str) -> str:
    """The plans of a frontier, by rising time.

    Args:
        num_dropped: plans left out: dominated, or above a limit, when simulated.
        complete: no further plan lies between them.
        title: what was planned.
    """
    counts = sorted({plan.decisions.num_gpus for plan in plans})
    colours = {count: COLOURS[i % len(COLOURS)] for i, count in enumerate(counts)}
    words = f"{len(plans)} plans, none better than another in both"
    words += "." if complete else "; more may lie between them."
    words += f" {num_dropped} were left out: dominated, or above a limit, when simulated." if num_dropped else ""
    rows = [(str(plan.decisions.num_gpus), *_figures(plan)) for plan in plans]
    return page(
        f"autopar: frontier of {title}",
        tag("h1", f"Time-energy frontier of {title}"),
        tag("p", words, class_="about"),
        *_asked(plans, "Objective"),
        section(
            "Energy over step time",
            f"What a longer step saves in energy; each point is a plan, its colour the number of GPUs. {SCOPE}",
            key([(colour, _gpus(count)) for count, colour in colours.items()]),
            *([_stairs(plans, colours)] if plans else []),
        ),
        section(
            "The plans", "The same in figures, with ranges.", table("Frontier", ("GPUs", *HEADING), rows, (0, 1, 8))
        ),
    )


def _stairs(plans: Sequence[Plan], colours: dict[int, str]) -> Markup:
    points = [(_time_s(plan), _energy_j(plan)) for plan in plans]
    series = [Series("frontier", tuple(points), "s7", is_stair=True, has_dots=False)]
    for count, colour in colours.items():
        own = tuple(p for p, plan in zip(points, plans, strict=True) if plan.decisions.num_gpus == count)
        series.append(Series(_gpus(count), own, "", colour, is_joined=False))
    times, joules = [t for t, _ in points], [j for _, j in points]
    label = f"{len(points)} plans from {format_seconds(min(times))} to {format_seconds(max(times))}, energy falling"
    return plot(series, linear_scale(times, format_seconds), linear_scale(joules, format_joules), label, _point_words)


def _point_words(time_s: float, energy_j: float) -> str:
    return f"{format_seconds(time_s)}, {format_joules(energy_j)}"


def sweep_page(plans: Sequence[Plan], missing: Sequence[tuple[int, str]], title: str, runs: Runs = NOTHING_RUN) -> str:
    """The best plan on each number of GPUs, and where more stop paying; `missing` are (number of GPUs, why none)."""
    heading = ("GPUs", "speed-up", "efficiency", "energy ratio", "J per s saved", *HEADING)
    rows = [
        (str(row.plan.decisions.num_gpus), f"{row.speedup:.2f}", f"{row.efficiency:.0%}", f"{row.energy_ratio:.2f}",
         "-" if row.marginal_j_per_s is None else f"{row.marginal_j_per_s:.4g}", *_figures(row.plan))
        for row in rows_of(plans)
    ]  # fmt: skip
    least = definitions((f"Least {name}", f"at {_gpus(count)}") for name, count in best_counts(plans).items())
    parts = [tag("h1", f"{title}: time and energy over the number of GPUs"), *_asked(plans)]
    if plans:
        base = _gpus(plans[0].decisions.num_gpus)
        crosses = " Single dots are runs on this machine." if runs.steps else ""
        parts += [
            section("Where more GPUs stop paying", "The number of GPUs at which a figure of a step is least.", least),
            section(
                "Step time",
                "How the step shortens; the dotted line is what perfect scaling would give." + crosses,
                _over_gpus(plans, _time_s, format_seconds, runs, lambda own: own.step_time_s, with_ideal=True),
            ),
            section(
                "Energy per step",
                f"What a step costs in energy, as the number of GPUs grows. {SCOPE}{crosses}",
                _over_gpus(plans, _energy_j, format_joules, runs, lambda own: own.energy_j),
            ),
            section(
                "The plans",
                f"Speed-up, efficiency and energy ratio are against {base}; joules per second saved, against the row "
                "before.",
                table("Plans by number of GPUs", heading, rows, (0, 5, 12)),
            ),
        ]
    parts += _run_section(plans, runs)
    for words, what, found in (
        ("Numbers of GPUs on which nothing could be planned, and why.", "Without a plan", missing),
        ("Numbers of GPUs whose plan was not run, and why.", "Not run", runs.left_out),
    ):
        if found:
            body = [(str(count), reason) for count, reason in found]
            parts.append(section(what, words, table(what, ("GPUs", "why"), body, (0, 1))))
    return page(f"autopar: sweep of {title}", *parts)


def _run_section(plans: Sequence[Plan], runs: Runs) -> list[Markup]:
    """What was run, beside what was predicted; every figure with its label and range."""
    rows = []
    for plan in plans:
        own, speedup = runs.steps.get(plan.decisions.num_gpus), runs.speedup(plan.decisions.num_gpus)
        if own is None or speedup is None:
            continue
        predicted = plan.predicted
        shown: tuple[tuple[Quantity, Callable[[float], str]], ...] = (
            (predicted.step_time_s, format_seconds), (own.step_time_s, format_seconds),
            (predicted.energy_j, format_joules), (own.energy_j, format_joules),
            (predicted.average_power_w, format_watts), (own.average_power_w, format_watts),
        )  # fmt: skip
        rows.append((str(plan.decisions.num_gpus), f"{speedup:.2f}", *(_labelled(*cell) for cell in shown)))
    if not rows:
        return []
    heading = ["GPUs", "speed-up", *(f"{what}, {how}" for what in ("step time", "energy", "average power")
                                     for how in ("predicted", "run"))]  # fmt: skip
    words = " ".join(("Plans that were run on this machine, beside their predictions.", *(f"{n}." for n in runs.notes)))
    return [section("Run on this machine", words, table("Runs by number of GPUs", heading, rows, (0,)))]


def _labelled(quantity: Quantity, show: Callable[[float], str]) -> Markup:
    return joined([quantity_cell(quantity, show), tag("small", quantity.label)])


def _over_gpus(
    plans: Sequence[Plan],
    figure: Callable[[Plan], float],
    show: Callable[[float], str],
    runs: Runs,
    measured: Callable[[MeasuredStep], Quantity],
    *,
    with_ideal: bool = False,
) -> Markup:
    points = tuple((float(plan.decisions.num_gpus), figure(plan)) for plan in plans)
    series = [Series("predicted", points)]
    by_label: dict[str, list[tuple[float, float]]] = {}
    for count, own in sorted(runs.steps.items()):
        by_label.setdefault(measured(own).label, []).append((float(count), measured(own).value))
    for label, found in sorted(by_label.items()):
        series.append(Series(f"run here, {label}", tuple(found), "k4", "k4", is_joined=False))
    if with_ideal:
        n, value = points[0]
        ideal = tuple((count, value * n / count) for count, _ in points)
        series.insert(0, Series("perfect scaling", ideal, "s7", has_dots=False))
    counts = [count for count, _ in points]
    values = [value for own in series for _, value in own.points]
    x = log_scale(counts, "{:.0f}".format, counts)
    label = ", ".join(f"{show(value)} on {_gpus(int(count))}" for count, value in points)
    return plot(series, x, _height_scale(values, show), label, lambda n, value: f"{_gpus(int(n))}: {show(value)}")


def _height_scale(values: Sequence[float], show: Callable[[float], str]) -> Scale:
    """Logarithmic where the values differ by more than a factor of 4."""
    if 0 < 4 * min(values) < max(values):
        return log_scale(values, show)
    return linear_scale(values, show, from_zero=True)


def _asked(plans: Sequence[Plan], *without: str) -> list[Markup]:
    """What was asked for, in the words of the plan on the most GPUs."""
    if not plans:
        return []
    return [definitions(pair for pair in header_words(plans[-1]) if pair[0] not in without)]


def _figures(plan: Plan) -> tuple[str, ...]:
    predicted = plan.predicted
    peak = max(predicted.peak_memory_bytes, key=lambda quantity: quantity.value)
    cells: tuple[tuple[Quantity, Callable[[float], str]], ...] = (
        (predicted.step_time_s, format_seconds),
        (predicted.energy_j, format_joules),
        (predicted.average_power_w, format_watts),
        (predicted.peak_power_w, format_watts),
        (peak, format_bytes),
    )
    shown = (quantity_cell(quantity, show) for quantity, show in cells)
    return (predicted.step_time_s.label, *shown, f"{plan.solver.gap:.2%}", point_words(plan))


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _time_s(plan: Plan) -> float:
    return plan.predicted.step_time_s.value


def _energy_j(plan: Plan) -> float:
    return plan.predicted.energy_j.value
