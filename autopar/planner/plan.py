"""Planning: capture, prices, search and re-timing, composed into one `Plan`.

`plan_model` starts from source text, `plan_source` from a loaded model, `plan_graph` from a captured graph and
needs no torch. Nothing here prices or decides anything itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, TypeAlias

from autopar.cost.hardware import Cluster, load_cluster
from autopar.cost.predict import predict
from autopar.cost.table import CostTables
from autopar.errors import AutoparError, InputError
from autopar.ir.graph import OpGraph
from autopar.ir.plan import SCHEMA_VERSION, ClusterReference, ModelReference, Plan, SolverReport
from autopar.ir.serialize_graph import graph_hash
from autopar.ir.solution import Alternative, Limits, Objective, Pins, Solution
from autopar.ir.verify import verify
from autopar.planner.detect import GpuChoice, choose_gpu
from autopar.planner.profile import LoadedProfile, load_rows
from autopar.rules.strategies import has_rule
from autopar.search.solve import search
from autopar.version import __version__

if TYPE_CHECKING:
    from autopar.capture.model_source import ModelSource

Progress: TypeAlias = Callable[[str], None]
"""Told in one short phrase what is being done."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for, apart from the model.

    Attributes:
        num_gpus: ceiling on the number of GPUs, >= 1.
        gpu: name in costmodels/, or None: what this machine has.
        gpus_per_node, memory_bytes: override the device file.
        batch_size: samples in the global batch; None: that of the example batch.
        profile: file of measured rows; None: the default store if there is one; `none`: no rows.
        use_all: use exactly `num_gpus`.
        time_limit_s: of the search.
        gap_tolerance: relative distance to the bound at which the search may stop.
    """

    num_gpus: int
    gpu: str | None = None
    gpus_per_node: int | None = None
    memory_bytes: int | None = None
    objective: Objective = field(default_factory=lambda: Objective("time"))
    limits: Limits = field(default_factory=Limits)
    pins: Pins = field(default_factory=Pins)
    profile: str | None = None
    batch_size: int | None = None
    use_all: bool = False
    time_limit_s: float | None = None
    gap_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise InputError(f"the number of GPUs must be at least 1, got {self.num_gpus}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class Target:
    """The cluster that a request means, with what was measured on it."""

    choice: GpuChoice
    cluster: Cluster
    profile: LoadedProfile

    @property
    def input_hash(self) -> str:
        """SHA-256 of every number that shapes the prices."""
        if not self.profile.digest:
            return self.cluster.input_hash
        return hashlib.sha256((self.cluster.input_hash + self.profile.digest).encode()).hexdigest()


def choose_target(request: PlanRequest) -> Target:
    """Resolve the GPU and load its numbers. Raises InputError for a GPU that has no cost model."""
    choice = choose_gpu(request.gpu)
    cluster = load_cluster(
        choice.name, request.num_gpus, gpus_per_node=request.gpus_per_node, memory_bytes=request.memory_bytes
    )
    return Target(choice, cluster, load_rows(request.profile, choice.name))


@dataclass(frozen=True)
class Planned:
    """A plan and the graph it was made for, captured at the global batch size."""

    plan: Plan
    graph: OpGraph


def plan_model(source: str, options: Mapping[str, str], request: PlanRequest, progress: Progress | None = None) -> Plan:
    """The plan of `make_plan`, alone."""
    return make_plan(source, options, request, progress).plan


@dataclass(frozen=True)
class CapturedGraph:
    """A captured graph, and sentences for the plan's reader about its capture."""

    graph: OpGraph
    notes: tuple[str, ...]


def make_plan(
    source: str,
    options: Mapping[str, str],
    request: PlanRequest,
    progress: Progress | None = None,
    *,
    target: Target | None = None,
    captured: CapturedGraph | None = None,
) -> Planned:
    """Plan the model that `source` (`model.py` or `hf:config.json`) builds.

    Args:
        target: of the request, if it is known already.
        captured: of the model, if it is known already; then nothing is loaded.

    Raises:
        InputError, CaptureError: the model, a name or a number is wrong.
        InfeasibleError: no plan fits.
    """
    target = target or choose_target(request)
    captured = captured or capture_graph(source, options, request.batch_size, progress)
    return _plan_captured(captured, ModelReference(source, dict(options), "", 0), request, target, progress)


def capture_graph(
    source: str, options: Mapping[str, str], batch_size: int | None, progress: Progress | None = None
) -> CapturedGraph:
    """Load and capture a model. Raises InputError and CaptureError."""
    from autopar.capture.source import load_source

    _tell(progress, "loading the model")
    return _capture(load_source(source, options), batch_size, progress)


def _capture(model: ModelSource, batch_size: int | None, progress: Progress | None) -> CapturedGraph:
    from autopar.capture.export import capture

    _tell(progress, f"capturing {model.name}")
    captured = capture(model, batch_size=batch_size)
    return CapturedGraph(captured.graph, captured.notes)


def plan_source(
    model: ModelSource, request: PlanRequest, progress: Progress | None = None, name: str = "<object>"
) -> Planned:
    """Plan a model that is loaded already; `name` goes into the plan as its source."""
    target = choose_target(request)
    captured = _capture(model, request.batch_size, progress)
    return _plan_captured(captured, ModelReference(name, {}, "", 0), request, target, progress)


def _plan_captured(
    captured: CapturedGraph, reference: ModelReference, request: PlanRequest, target: Target, progress: Progress | None
) -> Planned:
    plan = plan_graph(captured.graph, reference, request, target, progress)
    return Planned(replace(plan, notes=(*plan.notes, *captured.notes)), captured.graph)


def plan_graph(
    graph: OpGraph, reference: ModelReference, request: PlanRequest, target: Target, progress: Progress | None = None
) -> Plan:
    """Plan a captured graph; `reference` says where it came from, its hash and batch size are filled in here."""
    tables = CostTables(graph, target.cluster, pins=request.pins, profile=target.profile.store)
    _tell(progress, f"searching plans for {graph.name} on up to {request.num_gpus} GPUs")
    solution = search(
        tables,
        request.objective,
        pins=request.pins,
        limits=request.limits,
        use_all=request.use_all,
        gap_tolerance=request.gap_tolerance,
        time_limit_s=request.time_limit_s,
    )
    _tell(progress, "timing the plan")
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        model=replace(reference, graph_hash=graph_hash(graph), batch_size=graph.batch_size),
        cluster=_cluster_reference(request, target),
        objective=request.objective,
        limits=request.limits,
        decisions=solution.decisions,
        predicted=predict(tables, solution.decisions),
        solver=_solver_report(solution),
        rule_free_ops=_rule_free_ops(graph),
        baselines=(),
        alternatives=tuple(_finite(alternative) for alternative in solution.alternatives),
        notes=_notes(graph, request, target, solution),
        created=_created(),
    )
    issues = verify(plan, graph, target.cluster)
    if issues:
        raise AutoparError(f"the plan just made does not hold together, which is a bug of autopar: {issues[0]}")
    return plan


def _cluster_reference(request: PlanRequest, target: Target) -> ClusterReference:
    return ClusterReference(
        gpu=target.choice.name,
        num_gpus=request.num_gpus,
        gpus_per_node=target.cluster.gpus_per_node,
        memory_bytes=target.cluster.memory_bytes,
        input_hash=target.input_hash,
        origin=target.choice.origin,
    )


def _solver_report(solution: Solution) -> SolverReport:
    return SolverReport(
        status=solution.status,
        objective=solution.objective_value,
        bound=solution.bound,
        gap=solution.gap,
        wall_s=solution.wall_s,
        name=solution.solver,
    )


def _rule_free_ops(graph: OpGraph) -> dict[str, int]:
    """How many ops of each target do differentiable work but have no sharding rule."""
    works = (op for op in graph.ops if any(graph.values[name].requires_grad for name in op.outputs))
    counts = Counter(op.target for op in works if not has_rule(op.target))
    return dict(sorted(counts.items()))


def _finite(alternative: Alternative) -> Alternative:
    """JSON has no infinity: a figure that is none becomes None."""

    def known(figure: float | None) -> float | None:
        return figure if figure is not None and math.isfinite(figure) else None

    return replace(
        alternative,
        time_s=known(alternative.time_s),
        energy_j=known(alternative.energy_j),
        objective=known(alternative.objective),
        bound=known(alternative.bound),
    )


def _notes(graph: OpGraph, request: PlanRequest, target: Target, solution: Solution) -> tuple[str, ...]:
    choice = target.choice
    notes = [note for note in (choice.note, target.profile.note) if note]
    if 0 < choice.num_found < request.num_gpus and choice.origin == "detected":
        notes.append(f"this machine has {choice.num_found} GPUs; the plan may use up to {request.num_gpus}")
    used = solution.decisions.num_gpus
    if used < request.num_gpus:
        kind = request.objective.kind
        notes.append(f"{used} of {request.num_gpus} GPUs are best for {kind}; --use-all forces all of them")
    if not all(value.requires_grad for value in graph.parameters):
        notes.append("some parameters need no gradient; they are not updated and have no optimizer state")
    notes.append(f"priced with the optimizer {graph.optimizer}")
    return tuple(notes)


def installed_versions() -> dict[str, str]:
    """Versions of what a plan's content depends on."""
    others = {name: _version(name) for name in ("torch", "ortools", "numpy")}
    return {"autopar": __version__, "python": platform.python_version(), **others}


def _created() -> dict[str, str]:
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **installed_versions()}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _tell(progress: Progress | None, phrase: str) -> None:
    if progress is not None:
        progress(phrase)
