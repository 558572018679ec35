"""Finished plans and captured graphs, found again by the command that made them, without importing torch.

Two levels, both under `cache_directory()`:

- `plans/`: the plan file and its printed text, by everything that shapes them: source, options, request, numbers of the
  cluster, profile, and the state of the installation;
- `graphs/`: the captured graph, by source, options and batch size alone, so that planning for another cluster or
  objective starts at the search.

Each entry holds a `Manifest` of what building the model read; it counts only while that holds. Entries are written
whole under their final name, so runs need not wait for each other. A damaged entry counts as absent, and a cache that
cannot be written costs time at the next start and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.plan import Plan
from autopar.ir.serialize import dump_plan, write_atomic
from autopar.ir.serialize_graph import dump_graph, parse_graph
from autopar.planner.cache import cache_directory
from autopar.planner.manifest import Manifest, own_hash, watch_files
from autopar.planner.plan import CapturedGraph, Planned, capture_graph, installed_versions, make_plan
from autopar.planner.request import INTERRUPTED, PlanRequest, Progress, Target, choose_target
from autopar.report.text import plan_report

MAX_ENTRIES = 256
"""Of each kind; the oldest go first."""


@dataclass(frozen=True)
class Finished:
    """What `autopar plan` puts out.

    Attributes:
        plan_text: content of the plan file.
        report: the printed text, without closing hints.
        is_recalled: it comes from the cache.
        graph: that was planned; None if it is recalled.
    """

    plan_text: str
    report: str
    is_recalled: bool
    graph: OpGraph | None = None


@dataclass(frozen=True)
class Command:
    """What the user asks to be planned; `use_cache` False neither reads nor writes entries."""

    source: str
    options: Mapping[str, str]
    request: PlanRequest
    use_cache: bool = True


def finished_plan(command: Command, progress: Progress | None = None) -> Finished:
    """The plan of `make_plan` and its report, from the cache if it holds them.

    Raises:
        InputError, CaptureError, InfeasibleError: as `make_plan`.
    """
    if not command.use_cache:
        return _finish(make_plan(command.source, command.options, command.request, progress))
    target = choose_target(command.request)
    name = f"plans/{_plan_key(command, target)}"
    entry = _load(name)
    if entry is not None:
        return Finished(entry.content["plan"], entry.content["report"], is_recalled=True)
    captured, manifest = _recalled_graph(command, progress)
    planned = make_plan(command.source, command.options, command.request, progress, target=target, captured=captured)
    finished = _finish(planned)
    if _is_repeatable(planned.plan, command.request):
        _store(name, _Entry(manifest, {"plan": finished.plan_text, "report": finished.report}))
    return finished


def _finish(planned: Planned) -> Finished:
    return Finished(dump_plan(planned.plan), plan_report(planned.plan, planned.graph), False, planned.graph)


def graph_of(command: Command, finished: Finished, progress: Progress | None = None) -> OpGraph:
    """The graph that was planned, from the cache if it holds it. Raises as `finished_plan`."""
    return finished.graph or _recalled_graph(command, progress)[0].graph


def _is_repeatable(plan: Plan, request: PlanRequest) -> bool:
    """A search that was stopped, by a time limit or by Ctrl-C, may do better next time."""
    if INTERRUPTED in plan.notes:
        return False
    return plan.solver.status == "optimal" or request.time_limit_s is None


def _recalled_graph(command: Command, progress: Progress | None) -> tuple[CapturedGraph, Manifest]:
    """The captured graph, from the cache if it holds it, and what it depends on."""
    name = f"graphs/{_graph_key(command)}"
    entry = _load(name)
    found = None if entry is None else _parse(entry)
    if entry is not None and found is not None:
        return found, entry.manifest
    with watch_files() as watch:
        captured = capture_graph(command.source, command.options, command.request.batch_size, progress)
    manifest = watch.manifest()
    _store(name, _Entry(manifest, {"graph": dump_graph(captured.graph), "notes": list(captured.notes)}))
    return captured, manifest


def _parse(entry: _Entry) -> CapturedGraph | None:
    try:
        return CapturedGraph(parse_graph(entry.content["graph"]), tuple(entry.content["notes"]))
    except (InputError, KeyError):
        return None


def _plan_key(command: Command, target: Target) -> str:
    return _digest(
        {
            "graph": _graph_key(command),
            "request": asdict(command.request),
            "cluster": target.input_hash,
            "choice": asdict(target.choice),
            "profile": target.profile.note,
        }
    )


def _graph_key(command: Command) -> str:
    return _digest(
        {
            "source": command.source,
            "options": dict(command.options),
            "batch_size": command.request.batch_size,
            "directory": str(Path.cwd()),
            "search path": os.environ.get("PYTHONPATH", ""),
            "code": own_hash(),
            "versions": installed_versions(),
        }
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Entry:
    manifest: Manifest
    content: dict[str, Any]


def _load(name: str) -> _Entry | None:
    """The entry if it is there, whole, and its manifest holds."""
    try:
        packed = (cache_directory() / name).read_text(encoding="ascii")
        digest, _, body = packed.partition("\n")
        text = zlib.decompress(base64.b64decode(body, validate=True))
        if hashlib.sha256(text).hexdigest() != digest:
            return None
        held = json.loads(text)
        entry = _Entry(Manifest(**held["manifest"]), held["content"])
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None
    return entry if entry.manifest.still_holds() else None


def _store(name: str, entry: _Entry) -> None:
    """Write the entry and drop the oldest ones, or do nothing where that is impossible."""
    path = cache_directory() / name
    text = json.dumps({"manifest": asdict(entry.manifest), "content": entry.content}).encode()
    packed = base64.b64encode(zlib.compress(text, 1)).decode("ascii")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{hashlib.sha256(text).hexdigest()}\n{packed}")
        drop_oldest(path.parent, MAX_ENTRIES)
    except (OSError, InputError):
        return


def drop_oldest(directory: Path, most: int) -> None:
    """Delete all but the newest `most` files. Raises OSError."""
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir() if not path.name.startswith(".")}
    for path in sorted(times, key=lambda path: (times[path], path.name))[:-most]:
        path.unlink(missing_ok=True)
