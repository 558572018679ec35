"""Plan cache of sessions: plans on disk, by a key over everything that affects them.

A session captures its model in any case, so the key covers the graph itself, the request, every number of the cluster,
the options, autopar's code and the versions of the solver; two runs with equal keys would make the same plan. A
damaged entry counts as absent. `planner.recall` finds the plans of commands, without a graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.serialize import load_plan, save_plan
from autopar.ir.serialize_graph import graph_hash
from autopar.planner.manifest import own_hash
from autopar.planner.plan import installed_versions, plan_graph
from autopar.planner.request import INTERRUPTED, PlanRequest, Progress, Target

DIRECTORY_VARIABLE = "AUTOPAR_CACHE_DIR"


def cache_directory() -> Path:
    """`$AUTOPAR_CACHE_DIR`, else `$XDG_CACHE_HOME/autopar`, else `~/.cache/autopar`."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autopar"


def cache_key(graph: OpGraph, reference: ModelReference, request: PlanRequest, target: Target) -> str:
    """SHA-256 over all that affects the plan."""
    content = {
        "graph": graph_hash(graph),
        "reference": asdict(reference),
        "request": asdict(request),
        "cluster": target.input_hash,
        "origin": target.choice.origin,
        "versions": installed_versions(),
        "code": own_hash(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_plan(
    graph: OpGraph, reference: ModelReference, request: PlanRequest, target: Target, progress: Progress | None = None
) -> Plan:
    """The plan of `plan_graph`, from the cache if it holds one; a new plan is stored where that is possible."""
    path = cache_directory() / f"{cache_key(graph, reference, request, target)}.json"
    try:
        return load_plan(path)
    except InputError:
        plan = plan_graph(graph, reference, request, target, progress)
    if INTERRUPTED in plan.notes:
        return plan
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(plan, path)
    except (OSError, InputError):
        # A cache that cannot be written costs time at the next start and nothing else.
        return plan
    return plan
