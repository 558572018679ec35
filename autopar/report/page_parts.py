"""Parts of a page that come from the plan alone: figures, stages, memory, time, energy, and what else was looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from autopar.ir.inference import is_inference, rates_of
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.solution import Alternative
from autopar.report.page_detail import EXPOSED, ROUNDING, StepDetail, chosen_ranks, memory_curves
from autopar.report.page_html import Markup, joined, section, table, tag
from autopar.report.page_svg import COLOURS, key, rows, stacked, strip, ticks
from autopar.report.text import offloaded_words, rank_words, span_words
from autopar.units import format_bytes, format_joules, format_seconds, format_watts

MOST_ALTERNATIVES = 25
CAUSES = MappingProxyType(
    {"parameters": "k0", "gradients": "k1", "optimizer": "k2", "activations": "k3", "workspace": "k4", "buffers": "k5",
     "slack": "k7"}
)  # fmt: skip
"""Colours of causes of memory, in the order in which they are stacked; others follow."""
TIMES = MappingProxyType(
    {"forward": "k0", "backward": "k1", "backward of weights": "k6", "once a step": "k2", EXPOSED: "k4",
     "waiting for other ranks": "k7"}
)  # fmt: skip
ENERGIES = MappingProxyType({"dynamic": "k0", "blocked": "k1", "host": "k2"})
Show = Callable[[float], str]


def range_words(quantity: Quantity, show: Show) -> str:
    """`10 ms to 15 ms`; "" where the range is one point."""
    return "" if quantity.low == quantity.high else f"{show(quantity.low)} to {show(quantity.high)}"


def figure_cards(plan: Plan) -> Markup:
    """The predicted figures of a step, each with its range and label."""
    predicted = plan.predicted
    peak = max(predicted.peak_memory_bytes, key=lambda quantity: quantity.value)
    share = peak.value / plan.cluster.memory_bytes
    energy = f"TDP x time would say {format_joules(predicted.tdp_energy_j)}"
    alone = is_inference(plan)
    cards = [
        _card("Latency of a batch" if alone else "Step time", predicted.step_time_s, format_seconds),
        *([_rate_card(plan)] if alone else []),
        _card(f"Energy per {'batch' if alone else 'step'}", predicted.energy_j, format_joules, energy),
        _card("Average power", predicted.average_power_w, format_watts, "GPUs and hosts"),
        _card("Peak power", predicted.peak_power_w, format_watts, "GPUs and hosts"),
        _card("Memory of the fullest GPU", peak, format_bytes, f"{share:.0%} of what is usable"),
    ]
    return tag("div", *cards, class_="cards")


def _rate_card(plan: Plan) -> Markup:
    """Throughput of a plan for inference."""
    rates = rates_of(plan)
    rate = rates.samples_per_s if rates.tokens_per_s is None else rates.tokens_per_s
    return _card(f"Throughput, {rate.unit}", rate, lambda value: f"{value:,.4g}", "one batch after another")


def _card(name: str, quantity: Quantity, show: Show, remark: str = "") -> Markup:
    words = range_words(quantity, show)
    return tag(
        "div",
        tag("span", name),
        tag("b", show(quantity.value)),
        *([tag("span", words)] if words else []),
        *([tag("span", remark)] if remark else []),
        tag("span", quantity.label, class_="label"),
        class_="card",
    )


def stage_section(plan: Plan, detail: StepDetail | None) -> Markup:
    """The table of stages."""
    spent = ("dynamic energy",) if detail is not None else ()
    decided = ("blocks", "GPUs", "recompute", "clock") if _is_locked(plan) else ("blocks", "GPUs", "recompute")
    heading = ("stage", "label", *decided, "forward", "backward", "once a step", "memory", *spent)
    body = [_stage_row(plan, i, detail) for i in range(len(plan.decisions.stages))]
    chunks = plan.decisions.interleave
    words = "Seconds of one microbatch on each stage, and memory of each of its GPUs, with their ranges"
    words += "; joules of one step of all its GPUs, beyond what waiting draws." if spent else "."
    words += f" Every rank holds {chunks} stages; the memory is that of the rank." if chunks > 1 else ""
    return section("Stages", words, table("Stages, predicted", heading, body, words=(0, 1)))


def _is_locked(plan: Plan) -> bool:
    return any(stage.clock_hz for stage in plan.decisions.stages)


def _stage_row(plan: Plan, index: int, detail: StepDetail | None) -> tuple[str, ...]:
    stage, figures = plan.decisions.stages[index], plan.predicted.stages[index]
    times = (figures.forward_s, figures.backward_s, figures.step_s)
    return (
        str(index),
        ", ".join(dict.fromkeys(quantity.label for quantity in (*times, figures.peak_memory_bytes))),
        span_words(stage.start, stage.stop - 1),
        rank_words(plan, index) + (f" ({stage.gpu})" if stage.gpu else ""),
        stage.recompute,
        *([f"{stage.clock_hz / 1e6:.0f} MHz" if stage.clock_hz else "free"] if _is_locked(plan) else []),
        *(quantity_cell(quantity, format_seconds) for quantity in times),
        quantity_cell(figures.peak_memory_bytes, format_bytes),
        *([format_joules(detail.dynamic_j[index])] if detail is not None else []),
    )


def quantity_cell(quantity: Quantity, show: Show) -> Markup:
    """The value above its range."""
    words = range_words(quantity, show)
    return joined([show(quantity.value), *([tag("small", words)] if words else [])])


def memory_section(plan: Plan, detail: StepDetail | None) -> Markup:
    """Bytes of each rank by cause, against the capacity."""
    memory = [figures.memory_by_cause for figures in plan.predicted.stages[: plan.decisions.num_ranks]]
    colours = _colours(memory, CAUSES)
    capacities = [_capacity_bytes(plan, rank) for rank in range(len(memory))]
    peaks = plan.predicted.peak_memory_bytes
    end = max(
        1.0,
        *(1.02 * own for own in capacities),
        *(quantity.value for quantity in peaks),
        *(sum(own.values()) for own in memory),
    )
    entries = []
    for rank in chosen_ranks(len(memory)):
        parts = [(name, memory[rank].get(name, 0.0), colour) for name, colour in colours.items()]
        words = f"{format_bytes(peaks[rank].value)} of {format_bytes(capacities[rank])}"
        picture = strip(stacked(parts, format_bytes), end, f"rank {rank}: {words}", limit=capacities[rank])
        entries.append((f"rank {rank}", picture, words))
    entries.append(("", ticks(end, format_bytes), ""))
    heading = ("rank", *colours, "peak", "range", "label")
    body = [
        (str(rank), *(format_bytes(own.get(name, 0.0)) for name in colours), format_bytes(peaks[rank].value),
         range_words(peaks[rank], format_bytes) or "-", peaks[rank].label)
        for rank, own in enumerate(memory)
    ]  # fmt: skip
    outside = [f"rank {rank}: {words}" for rank in range(len(memory)) if (words := offloaded_words(plan, rank))]
    return section(
        "Memory per GPU",
        "What fills the memory of each pipeline rank's GPUs at their worst moment; the upright line is what is usable."
        + (f" Outside of it lie, per GPU, {'; '.join(outside)}." if outside else ""),
        key([(colour, name) for name, colour in colours.items()]),
        rows(entries),
        table("Memory by cause, predicted", heading, body, words=(0, len(heading) - 1)),
        *([memory_curves(detail, max(capacities))] if detail is not None else []),
    )


def _capacity_bytes(plan: Plan, rank: int) -> float:
    """Usable on the GPUs of a rank; the most of any type where its own is not said."""
    cluster, gpu = plan.cluster, plan.decisions.stages[rank].gpu
    groups = cluster.description.groups if cluster.description is not None else ()
    own = next((group.memory_bytes for group in groups if group.gpu == gpu), None)
    return own or cluster.memory_bytes


def _colours(parts: Sequence[Mapping[str, float]], known: Mapping[str, str]) -> dict[str, str]:
    """Name -> colour of everything that is not 0 everywhere: those known in their order, then the others."""
    found = {name for own in parts for name, size in own.items() if size > 0}
    others = sorted(found - set(known))
    return {name: colour for name, colour in known.items() if name in found} | {
        name: COLOURS[-1 - i % len(COLOURS)] for i, name in enumerate(others)
    }


def time_section(plan: Plan, detail: StepDetail | None) -> Markup:
    """Seconds of each rank by cause."""
    ranks = plan.decisions.num_ranks
    times = [_times_s(plan, rank, detail) for rank in range(ranks)]
    end = max(1e-12, *(sum(own.values()) for own in times))
    colours = _colours(times, TIMES)
    entries = []
    for rank in chosen_ranks(ranks):
        parts = [(name, times[rank].get(name, 0.0), colour) for name, colour in colours.items()]
        busy = sum(size for name, size, _ in parts if not name.startswith("waiting"))
        words = f"works {busy / end:.0%}"
        entries.append((f"rank {rank}", strip(stacked(parts, format_seconds), end, f"rank {rank}: {words}"), words))
    entries.append(("", ticks(end, format_seconds), ""))
    label = plan.predicted.step_time_s.label
    body = [
        (str(rank), *(format_seconds(own.get(name, 0.0)) for name in colours), label) for rank, own in enumerate(times)
    ]
    heading = ("rank", *colours, "label")
    hidden = "" if detail is not None else " Collectives of parameters and gradients count where they are waited for."
    return section(
        "Where the time goes",
        f"The seconds of one step of each rank by cause; collectives that split ops are part of forward and "
        f"backward.{hidden}",
        key([(colour, name) for name, colour in colours.items()]),
        rows(entries),
        table("Time by cause", heading, body, words=(0, len(heading) - 1)),
    )


def _times_s(plan: Plan, rank: int, detail: StepDetail | None) -> dict[str, float]:
    """By `TIMES`, which add up to the step."""
    decisions, own = plan.decisions, plan.predicted.stages[rank :: plan.decisions.num_ranks]
    if detail is not None:
        parts = detail.times_s(rank)
    else:
        parts = {
            "forward": decisions.num_microbatches * sum(stage.forward_s.value for stage in own),
            "backward": decisions.num_microbatches * sum(stage.backward_s.value for stage in own),
            "once a step": sum(stage.step_s.value for stage in own),
        }
    step_s = plan.predicted.step_time_s.value
    waits_s = step_s - sum(parts.values())
    return {**parts, "waiting for other ranks": waits_s if waits_s > ROUNDING * step_s else 0.0}


def energy_section(plan: Plan) -> Markup:
    """Joules by cause beside the naive figure."""
    predicted = plan.predicted
    causes, naive = predicted.energy_by_cause, predicted.tdp_energy_j
    end = max(1e-12, naive, sum(causes.values()))
    colours = _colours([causes], ENERGIES)
    parts = [(name, causes[name], colour) for name, colour in colours.items()]
    words = format_joules(predicted.energy_j.value)
    entries = [
        ("predicted", strip(stacked(parts, format_joules), end, f"predicted: {words}"), words),
        ("TDP x time", strip(stacked([("TDP x time", naive, "k7")], format_joules), end, "TDP x time"),
         format_joules(naive)),
        ("", ticks(end, format_joules), ""),
    ]  # fmt: skip
    total, label = sum(causes.values()) or 1.0, predicted.energy_j.label
    body = [(name, format_joules(size), f"{size / total:.0%}", label) for name, size in sorted(causes.items())]
    return section(
        "Where the energy goes",
        "The joules of one step: dynamic is what ops and collectives draw beyond waiting, blocked what GPUs draw while "
        "a job holds them, host the rest of the nodes; TDP x time is the naive figure, the boards' power limit for the "
        "whole step.",
        key([(colour, name) for name, colour in colours.items()]),
        rows(entries),
        table("Energy by cause", ("cause", "energy", "share", "label"), body, words=(0, 3)),
    )


def splits_section(plan: Plan, detail: StepDetail) -> Markup:
    """How the heavy ops are split."""
    if all(axis.size == 1 for axis in plan.decisions.extent.axes) or not detail.splits:
        return Markup("")
    body = [
        (split.blocks if i == 0 else "", words, names)
        for split in detail.splits
        for i, (words, names) in enumerate(split.ops)
    ]
    return section(
        "How the heavy ops are split",
        "What each mesh axis divides of the ops that do most of the work, block by block.",
        table("Splits", ("blocks", "split", "ops"), body, words=(0, 1, 2)),
    )


def baselines_section(plan: Plan) -> Markup:
    """Well-known ways to split the model, beside the plan."""
    if not plan.baselines:
        return Markup("")
    mine = plan.predicted
    peak = max(mine.peak_memory_bytes, key=lambda quantity: quantity.value)
    shown = (format_seconds, format_joules, format_bytes)
    cells = map(quantity_cell, (mine.step_time_s, mine.energy_j, peak), shown)
    body = [("this plan", str(plan.decisions.num_gpus), *cells, "x1", "x1", mine.step_time_s.label, "")]
    for own in plan.baselines:
        figures = zip((own.step_time_s, own.energy_j, own.peak_memory_bytes), shown, strict=True)
        body.append(
            (
                own.name,
                str(own.num_gpus) if own.num_gpus else "-",
                *("-" if quantity is None else quantity_cell(quantity, show) for quantity, show in figures),
                _ratio(own.step_time_s, mine.step_time_s),
                _ratio(own.energy_j, mine.energy_j),
                "-" if own.step_time_s is None else own.step_time_s.label,
                ". ".join(filter(None, (own.description, own.reason))),
            )
        )
    heading = ("", "GPUs", "step time", "energy", "memory", "time", "energy", "label", "configuration")
    return section(
        "Against well-known ways to split",
        "The best plan of each well-known family on the same GPUs, searched and simulated like the plan; x is against "
        "the plan.",
        table("Baselines", heading, body, words=(0, 7, 8)),
    )


def _ratio(other: Quantity | None, mine: Quantity) -> str:
    return "-" if other is None or not mine.value else f"x{other.value / mine.value:.2f}"


def alternatives_section(plan: Plan) -> Markup:
    """The best skeletons that lost, and why the others fell out."""
    if not plan.alternatives:
        return Markup("")
    priced = sorted((a for a in plan.alternatives if a.objective is not None), key=_by_objective)
    fallen = Counter(a.reason for a in plan.alternatives if a.objective is None)
    body = [
        (a.description, _figure(a.time_s, format_seconds), _figure(a.energy_j, format_joules),
         _figure(a.objective, "{:.6g}".format), _figure(a.bound, "{:.6g}".format), a.reason or "-")
        for a in priced[:MOST_ALTERNATIVES]
    ]  # fmt: skip
    heading = ("skeleton", "time", "energy", "objective", "bound", "why it lost")
    parts = (
        [table("Best of those with a plan (formula figures, modelled)", heading, body, words=(0, 5))] if body else []
    )
    if len(priced) > len(body):
        parts.append(tag("p", f"{len(priced) - len(body)} more have a worse objective.", class_="remark"))
    if fallen:
        reasons = [(reason or "-", str(count)) for reason, count in sorted(fallen.items(), key=lambda e: (-e[1], e[0]))]
        shown = reasons[:MOST_ALTERNATIVES]
        parts.append(table("Those without a plan", ("why", "skeletons"), shown))
    return section(
        "Alternatives that lost",
        f"The {len(plan.alternatives)} meshes, numbers of stages and of microbatches that the search looked at, by "
        f"{plan.objective.kind}.",
        *parts,
    )


def _by_objective(alternative: Alternative) -> tuple[float, str]:
    return alternative.objective or 0.0, alternative.description


def _figure(value: float | None, show: Show) -> str:
    return "-" if value is None else show(value)
