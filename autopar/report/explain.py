"""Why this plan: where its time, energy and memory go, and which alternatives lost, by how much or for what reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from autopar.ir.pipeline import splits_backward, step_time_s
from autopar.ir.plan import Plan
from autopar.ir.savings import Savings
from autopar.ir.solution import Alternative
from autopar.report.explain_savings import savings_report
from autopar.report.text import WIDTH, baseline_table, mesh_words, offloaded_words, table, wrapped
from autopar.rules.contractions import CONTEXT
from autopar.rules.experts import EXCHANGE, EXPERTS
from autopar.units import format_bytes, format_joules, format_seconds

MAX_ALTERNATIVES = 10
SPECIAL: Mapping[str, frozenset[str]] = MappingProxyType(
    {"context": frozenset({CONTEXT}), "experts": frozenset({EXPERTS, EXCHANGE})}
)
"""Pin that switches a way to split off -> its labels."""


def explain_report(plan: Plan, rival: Plan | None = None, rival_name: str = "", savings: Savings | None = None) -> str:
    """The whole explanation; `rival` is a plan made under `rival_name`'s pins, to compare with."""
    parts = [wrapped("Plan", f"{plan.decisions.num_gpus} GPUs: {mesh_words(plan)}, objective {plan.objective.kind}")]
    parts += [_time(plan), _energy(plan), _memory(plan)]
    parts += [_alternatives(plan.alternatives, plan.objective.kind), baseline_table(plan)[:-1]]
    parts.append(_special(plan))
    if rival is not None:
        parts.append(compare(plan, rival, rival_name))
    if savings is not None:
        parts.append(savings_report(savings))
    return "\n\n".join("\n".join(part) for part in parts if part)


def _special(plan: Plan) -> list[str]:
    """How to price the plan without what it uses of sequence-parallel attention and expert parallelism."""
    labels = {axis.label for strategy in plan.decisions.ops.values() for axis in strategy}
    used = [name for name, own in SPECIAL.items() if labels & own]
    words = " and ".join(f"--why-not {name}=off" for name in used)
    return wrapped("Without", f"{words} compares with the best plan that does without") if used else []


def explain_json(plan: Plan, rival: Plan | None = None) -> dict[str, Any]:
    """The same as numbers. `rival` holds its predicted step time and energy, and their ratios to the plan's."""
    content: dict[str, Any] = {
        "decision": {"num_gpus": plan.decisions.num_gpus, "pp": plan.decisions.num_ranks}
        | {axis.name: axis.size for axis in plan.decisions.mesh.axes}
        | {f"stage{k}": {a.name: a.size for a in mesh.axes} for k, mesh in enumerate(plan.decisions.stage_meshes)},
        "time_s": time_parts(plan),
        "energy_j": dict(plan.predicted.energy_by_cause),
        "memory_bytes": [dict(stage.memory_by_cause) for stage in plan.predicted.stages],
        "alternatives": [
            {name: getattr(a, name) for name in ("description", "time_s", "energy_j", "objective", "bound", "reason")}
            for a in plan.alternatives
        ],
    }
    if rival is not None:
        time_s, energy_j = rival.predicted.step_time_s.value, rival.predicted.energy_j.value
        content["rival"] = {
            "step_time_s": time_s,
            "energy_j": energy_j,
            "time_ratio": time_s / plan.predicted.step_time_s.value,
            "energy_ratio": energy_j / plan.predicted.energy_j.value,
        }
    return content


def time_parts(plan: Plan) -> dict[str, float]:
    """Seconds of the slowest rank's forward, backward and once-a-step work, and the rest (bubble and transfer)."""
    stages, count, ranks = plan.predicted.stages, plan.decisions.num_microbatches, plan.decisions.num_ranks
    work = [
        {
            "forward": count * sum(s.forward_s.value for s in stages[k::ranks]),
            "backward": count * sum(s.backward_s.value for s in stages[k::ranks]),
            "once a step": sum(s.step_s.value for s in stages[k::ranks]),
        }
        for k in range(ranks)
    ]
    parts = max(work, key=lambda own: sum(own.values()))
    parts["waiting"] = max(0.0, plan.predicted.step_time_s.value - sum(parts.values()))
    return parts


def compare(plan: Plan, rival: Plan, rival_name: str, verdict: str = "") -> list[str]:
    """A table of the plan beside the rival, below `verdict` and what the rival is."""
    rows = [("", "this plan", rival_name[:24], "ratio")]
    mine, other = plan.predicted, rival.predicted
    for name, show, a, b in (
        ("step time", format_seconds, mine.step_time_s.value, other.step_time_s.value),
        ("energy", format_joules, mine.energy_j.value, other.energy_j.value),
        ("peak memory", format_bytes, _peak(plan), _peak(rival)),
    ):
        rows.append((name, show(a), show(b), f"{b / a:.3f}"))
    verdict = (
        verdict or f"Why not {rival_name}: it becomes "
    ) + f"{mesh_words(rival)} on {rival.decisions.num_gpus} GPUs"
    return [*wrapped("Rival", verdict), *table(rows)]


def _peak(plan: Plan) -> float:
    return max(quantity.value for quantity in plan.predicted.peak_memory_bytes)


def _shares(parts: dict[str, float]) -> list[tuple[str, str]]:
    total = sum(parts.values())
    return [(name, f"{value / total:.0%}") for name, value in parts.items() if total and value / total >= 0.005]


def _time(plan: Plan) -> list[str]:
    parts = time_parts(plan)
    words = ", ".join(f"{name} {format_seconds(parts[name])} ({share})" for name, share in _shares(parts))
    lines = wrapped("Time", f"{format_seconds(plan.predicted.step_time_s.value)} a step; slowest stage: {words}")
    if plan.decisions.num_ranks > 1:
        stages = [s.forward_s.value + s.backward_s.value for s in plan.predicted.stages]
        steps = [s.step_s.value for s in plan.predicted.stages]
        formula = step_time_s(stages, steps, plan.decisions.num_microbatches, plan.decisions.interleave)
        split = splits_backward(plan.decisions.schedule, plan.decisions.num_ranks)
        name = "its closed form under 1f1b" if split else "closed form of the pipeline"
        lines += wrapped("", f"{name}: {format_seconds(formula)}")
    return lines


def _energy(plan: Plan) -> list[str]:
    parts = dict(sorted(plan.predicted.energy_by_cause.items()))
    words = ", ".join(f"{name} {format_joules(parts[name])} ({share})" for name, share in _shares(parts))
    return wrapped("Energy", f"{format_joules(plan.predicted.energy_j.value)} a step: {words}")


def _memory(plan: Plan) -> list[str]:
    lines = []
    for i, stage in enumerate(plan.predicted.stages):
        causes = ", ".join(f"{n} {format_bytes(size)}" for n, size in sorted(stage.memory_by_cause.items()) if size > 0)
        text = f"stage {i}: {format_bytes(stage.peak_memory_bytes.value)}: {causes}"
        outside = offloaded_words(plan, i)
        text += f"; offloaded: {outside}" if outside else ""
        lines += wrapped("Memory" if i == 0 else "", text)
    return lines


def _alternatives(alternatives: Sequence[Alternative], kind: str) -> list[str]:
    if not alternatives:
        return []
    priced = [a for a in alternatives if a.objective is not None]
    ranked = sorted(priced, key=lambda a: (a.objective or 0.0, a.description))[:MAX_ALTERNATIVES]
    lines = [f"Best of the {len(alternatives)} skeletons looked at, by {kind} (formula figures)"]
    for a in ranked:
        time = format_seconds(a.time_s) if a.time_s is not None else "-"
        energy = format_joules(a.energy_j) if a.energy_j is not None else "-"
        lines.append(f"  {_short(a)[:40]:<40} {time:>10} {energy:>10}  {_reason(a)}"[:WIDTH].rstrip())
    fallen = [a for a in alternatives if a.objective is None]
    for a in sorted(fallen, key=lambda a: a.description)[: MAX_ALTERNATIVES - len(ranked) + 3]:
        lines.append(f"  {_short(a)[:40]:<40} {a.reason}"[:WIDTH].rstrip())
    return lines


def _short(alternative: Alternative) -> str:
    return alternative.description.replace("microbatches=", "m=")


def _reason(alternative: Alternative) -> str:
    return alternative.reason.removesuffix(" than the plan chosen")
