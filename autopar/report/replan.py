"""The answer of `autopar replan`: which plan it is now, where it comes from, and what changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar.ir.plan import Plan
from autopar.ir.serialize import prediction_json
from autopar.report.diff import diff_json, diff_report
from autopar.report.text import limits_words, objective_words, wrapped

HOW = {
    "kept": "the plan stays: it is the best of",
    "picked": "picked without a search, as the best of",
    "computed": "computed by a search; there were",
}


def replan_report(old: Plan, new: Plan, how: str, counts: tuple[int, int], sources: Sequence[str]) -> str:
    """`counts` are plans at hand, and those of them that keep the limits."""
    words = f"{HOW[how]} {counts[1]} that fit, of {counts[0]} plans at hand"
    lines = wrapped("Replanned", words + (f" ({', '.join(sources)})" if sources else ""))
    lines += wrapped("Asked", f"{objective_words(new)}, on up to {new.cluster.num_gpus} GPUs")
    limits = limits_words(new)
    lines += wrapped("Limits", limits) if limits else []
    solver = new.solver
    lines += wrapped(
        "Bound", f"{solver.bound:.6g}, gap {solver.gap:.2%}" if solver.bound else "none without a search (--compute)"
    )
    return "\n".join([*lines, "", diff_report(old, new, ("before", "now"))])


def replan_json(old: Plan, new: Plan, how: str, counts: tuple[int, int], sources: Sequence[str]) -> dict[str, Any]:
    """The same as values; `changes` as `autopar diff --json`, from the old plan to the new."""
    return {
        "how": how,
        "num_stored": counts[0],
        "num_fitting": counts[1],
        "sources": list(sources),
        "num_gpus": new.decisions.num_gpus,
        "predicted": prediction_json(new.predicted),
        "objective": new.solver.objective,
        "bound": new.solver.bound,
        "changes": diff_json(old, new),
    }
