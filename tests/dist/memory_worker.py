"""What ranks of `test_memory.py` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopar.ir.serialize import parse_plan
from autopar.planner.assemble import make_executor
from autopar.planner.execute import prepare, run_options
from autopar.profiler.live import LiveBytes
from autopar.runtime.executor import join_plan


def peaks(arguments: Mapping[str, Any]) -> list[int]:
    """Live bytes of this rank at the worst moment of two steps, plan by plan."""
    found = []
    for text in arguments["plans"]:
        plan = parse_plan(text)
        ready = prepare(plan, "cpu")
        graph, mesh = ready.captured.graph, join_plan(ready.captured.graph, plan.decisions, "cpu")
        with LiveBytes() as live:
            executor = make_executor(
                graph, plan.decisions, ready.state, mesh, run_options(plan, "cpu"), behind=ready.behind
            )
            for _ in range(2):
                executor.step(ready.batch)
        found.append(live.peak_bytes)
    return found
