"""A plan as one HTML page that needs nothing else: no network, no script, no file beside it.

The page says what was decided, what it should cost and how that is known, draws the simulated step, and shows what else
was looked at. Equal plans give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from autopar.ir.plan import Plan
from autopar.ir.savings import Savings
from autopar.report.explain_savings import savings_section
from autopar.report.page_detail import StepDetail, streams_section, timeline_section
from autopar.report.page_html import Markup, definitions, page, section, table, tag
from autopar.report.page_parts import (
    alternatives_section,
    baselines_section,
    energy_section,
    figure_cards,
    memory_section,
    splits_section,
    stage_section,
    time_section,
)
from autopar.report.text import decision_words, header_words
from autopar.units import format_seconds


def plan_page(plan: Plan, detail: StepDetail | None = None, missing: str = "", savings: Savings | None = None) -> str:
    """The whole document.

    Args:
        detail: the step simulated again; None: the parts that need it are left out.
        missing: why there is no detail.
        savings: against the plan of least time, where they were asked for.
    """
    name = plan.model.source
    parts = [
        tag("h1", f"Plan of {name}"),
        tag("p", _summary(plan), class_="about"),
        figure_cards(plan),
        _decision(plan),
        _simulated(plan, detail, missing),
        memory_section(plan, detail),
        time_section(plan, detail),
        energy_section(plan),
        savings_section(savings) if savings is not None else Markup(""),
        stage_section(plan, detail),
        splits_section(plan, detail) if detail is not None else Markup(""),
        baselines_section(plan),
        alternatives_section(plan),
        _search(plan),
        _notes(plan.notes),
        _sources(plan),
        _created(plan),
    ]
    return page(f"autopar: {name}", *parts)


def _summary(plan: Plan) -> str:
    meshes = plan.decisions.stage_meshes or (plan.decisions.mesh,)
    mesh = " / ".join(" x ".join(f"{a.name} {a.size}" for a in mesh.axes if a.size > 1) or "1" for mesh in meshes)
    mesh = "" if mesh == "1" else mesh
    stages = plan.decisions.num_ranks
    split = " x ".join(filter(None, (f"{stages} pipeline stages" if stages > 1 else "", mesh))) or "no parallelism"
    step = format_seconds(plan.predicted.step_time_s.value)
    return (
        f"{plan.decisions.num_gpus} x {plan.cluster.gpu}, {split}: a step of {plan.model.batch_size} samples in {step}."
    )


def _decision(plan: Plan) -> Markup:
    first, *others = decision_words(plan)
    pairs = [*header_words(plan), ("Decision", first), *(("", words) for words in others)]
    return section("The decision", "What was asked for, and what the plan decides.", definitions(pairs))


def _simulated(plan: Plan, detail: StepDetail | None, missing: str) -> Markup:
    if detail is None:
        words = missing or "the page was made from the plan file alone"
        return section("Timeline of one step", f"Not drawn: {words}.")
    return Markup(timeline_section(plan, detail) + streams_section(detail))


def _search(plan: Plan) -> Markup:
    solver, predicted = plan.solver, plan.predicted
    value = plan.objective.value(predicted.step_time_s.value, predicted.energy_j.value, plan.decisions.num_gpus)
    pairs = [
        ("Status", solver.status),
        ("Objective", f"{solver.objective:.6g} ({plan.objective.kind}, by the search's formula)"),
        ("Simulated", f"{value:.6g} (the same of the figures above)"),
        ("Bound", f"{solver.bound:.6g}: by the same formula no plan of the searched space is below"),
        ("Gap", f"{solver.gap:.2%}"),
        ("Solver", f"{solver.name}, {solver.wall_s:.1f} s"),
    ]
    words = "How sure it is that no better plan exists: the best plan's objective against a proven bound."
    return section("Search", words, definitions(pairs))


def _notes(notes: Sequence[str]) -> Markup:
    if not notes:
        return Markup("")
    return section("Notes", "What the planner wants you to know.", tag("ul", *(tag("li", note) for note in notes)))


def _sources(plan: Plan) -> Markup:
    """Where the prices come from: labels, device file, software."""
    total = sum(plan.predicted.sources.values())
    body = [(label, str(n), f"{n / total:.1%}") for label, n in sorted(plan.predicted.sources.items()) if total]
    pairs = [
        ("Device", f"{plan.cluster.gpu}: costmodels/{plan.cluster.gpu}.json holds every number with its source"),
        ("Prices", f"SHA-256 of all that shaped them: {plan.cluster.input_hash}"),
        ("Model", f"SHA-256 of the captured graph: {plan.model.graph_hash}"),
    ]
    if plan.cluster.description is not None:
        pairs[0] = ("Devices", ", ".join(f"costmodels/{g.gpu}.json" for g in plan.cluster.description.groups))
    if plan.rule_free_ops:
        words = ", ".join(f"{count} {target}" for target, count in plan.rule_free_ops.items())
        pairs.append(("No rule", f"these ops have no sharding rule and are replicated: {words}"))
    facts = [(name.replace("_", " "), _fact(value)) for name, value in asdict(plan.software).items()]
    return section(
        "Where the prices come from",
        "Measured is from a device, modelled from a formula, assumed from a data sheet or an estimate.",
        definitions(pairs),
        *([table("Prices by label", ("label", "entries", "share"), body)] if body else []),
        table("Software that the figures assume", ("fact", "value"), facts, words=(0, 1)),
    )


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "as the parameter" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _created(plan: Plan) -> Markup:
    words = ", ".join(f"{name} {value}" for name, value in sorted(plan.created.items()))
    return tag("footer", f"Made by autopar. {words}", id="created")
