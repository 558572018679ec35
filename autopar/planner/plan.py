"""Planning: capture, prices, search and re-timing, composed into one `Plan`.

`plan_model` starts from source text, `plan_source` from a loaded model, `plan_graph` from a captured graph and
needs no torch. Nothing here prices or decides anything itself.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from autopar.cost.mixed import MixedCluster, MixedTables
from autopar.cost.table import CostTables
from autopar.errors import AutoparError, InfeasibleError
from autopar.ir.graph import OpGraph
from autopar.ir.inference import cache_bytes, tokens_per_sample
from autopar.ir.pin_fields import pin_fields
from autopar.ir.plan import SCHEMA_VERSION, ClusterReference, ModelReference, Plan, SolverReport
from autopar.ir.serialize_graph import graph_hash
from autopar.ir.solution import Alternative, Objective
from autopar.ir.verify import verify
from autopar.planner.choose import Candidate, Choice, Chooser, describe
from autopar.planner.economy import economy_notes, settled
from autopar.planner.request import INTERRUPTED, PlanRequest, Progress, Target, choose_target, say_nothing
from autopar.planner.uneven import NOTE as UNEVEN_NOTE
from autopar.planner.uneven import UnevenChooser
from autopar.rules.strategies import has_rule
from autopar.units import format_bytes
from autopar.version import __version__

if TYPE_CHECKING:
    from autopar.capture.model_source import ModelSource

FEWER = "--use-all forces all of them"
"""End of the note that says for which objective fewer GPUs are best."""


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
    chooser = Chooser(graph, request, target, progress or say_nothing)
    tables = chooser.tables(request.pins)
    asked, choice = settled(request, lambda asked: _choose(replace(chooser, request=asked), tables))
    plan = assemble_plan(graph, reference, asked, target, choice)
    if request.economy is None:
        return plan
    rival = _thriftiest(chooser, tables) if request.with_baselines else None
    return replace(plan, notes=(*plan.notes, *economy_notes(plan, request.economy, rival)))


def _choose(chooser: Chooser, tables: CostTables | MixedTables) -> Choice:
    """The best candidate; raises InfeasibleError where there is none."""
    return UnevenChooser(chooser).choose(tables) if chooser.request.pins.meshes else chooser.choose(tables)


def _thriftiest(chooser: Chooser, tables: CostTables | MixedTables) -> Candidate | None:
    """The plan of least energy under the same pins and limits."""
    request = replace(chooser.request, objective=Objective("energy"), with_baselines=False)
    try:
        return _choose(replace(chooser, request=request), tables).candidate
    except InfeasibleError:
        # Simulated, the search's best for energy breaks a limit that another plan keeps.
        return None


def assemble_plan(
    graph: OpGraph, reference: ModelReference, request: PlanRequest, target: Target, choice: Choice
) -> Plan:
    """The plan of a choice, held against graph and cluster."""
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        model=replace(reference, graph_hash=graph_hash(graph), batch_size=graph.batch_size),
        cluster=cluster_reference(request, target),
        objective=request.objective,
        limits=request.limits,
        decisions=choice.candidate.decisions,
        predicted=choice.candidate.prediction,
        solver=_solver_report(choice),
        rule_free_ops=_rule_free_ops(graph),
        baselines=choice.baselines,
        alternatives=tuple(_finite(alternative) for alternative in choice.solution.alternatives),
        notes=_notes(graph, request, target, choice),
        created=_created(),
        software=request.software,
        pinned=pin_fields(request.pins),
        tokens_per_sample=tokens_per_sample(graph) if graph.is_inference else 0,
    )
    issues = verify(plan, graph, target.cluster)
    if issues:
        raise AutoparError(f"the plan just made does not hold together, which is a bug of autopar: {issues[0]}")
    return plan


def cluster_reference(request: PlanRequest, target: Target) -> ClusterReference:
    """What a plan remembers of the cluster it is for."""
    return ClusterReference(
        gpu=target.choice.name,
        num_gpus=request.num_gpus,
        gpus_per_node=target.cluster.gpus_per_node,
        memory_bytes=target.cluster.memory_bytes,
        input_hash=target.input_hash,
        origin=target.choice.origin,
        description=request.cluster if isinstance(target.cluster, MixedCluster) else None,
        network_bytes_per_s=request.network_bytes_per_s,
        gpu_power_limit_w=request.gpu_power_limit_w,
    )


def _solver_report(choice: Choice) -> SolverReport:
    """The search's own report, with the objective of another candidate where that one was chosen."""
    solution, candidate = choice.solution, choice.candidate
    objective = candidate.value if candidate.formula is None else candidate.formula
    gap = max(0.0, (objective - solution.bound) / abs(objective)) if objective else 0.0
    return SolverReport(
        status=solution.status if candidate.formula == solution.objective_value else "feasible",
        objective=objective,
        bound=min(solution.bound, objective),
        gap=gap,
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


def _notes(graph: OpGraph, request: PlanRequest, target: Target, choice_made: Choice) -> tuple[str, ...]:
    choice = target.choice
    notes = [note for note in (choice.note, target.profile.note) if note]
    if 0 < choice.num_found < request.num_gpus and choice.origin == "detected":
        notes.append(f"this machine has {choice.num_found} GPUs; the plan may use up to {request.num_gpus}")
    candidate = choice_made.candidate
    if candidate.formula != choice_made.solution.objective_value:
        first = describe(choice_made.solution.decisions)
        name = f"the baseline {candidate.name}" if candidate.name else "another plan"
        notes.append(f"the search's best is {first}; simulated, {name} is better or keeps the limits, and was taken")
    if choice_made.solution.is_interrupted:
        notes.append(INTERRUPTED)
    if candidate.decisions.stage_meshes:
        notes.append(UNEVEN_NOTE)
    used = candidate.decisions.num_gpus
    if used < request.num_gpus:
        kind = request.objective.kind
        notes.append(f"{used} of {request.num_gpus} GPUs are best for {kind}; {FEWER}")
    locked = sorted({stage.clock_hz for stage in candidate.decisions.stages if stage.clock_hz})
    if locked:
        commands = ", ".join(f"sudo nvidia-smi --lock-gpu-clocks={hz / 1e6:.0f}" for hz in locked)
        notes.append(
            "the figures hold at locked clocks: 'autopar run --lock-clocks' sets and restores them where it may, else "
            f"{commands} on the stage's GPUs (undo: --reset-gpu-clocks); --clocks max plans without"
        )
    if request.gpu_power_limit_w is not None:
        watts = f"{request.gpu_power_limit_w:g}"
        notes.append(f"priced with GPUs limited to {watts} W: sudo nvidia-smi --power-limit={watts} on every node")
    if graph.is_inference:
        return (*notes, *_inference_notes(graph))
    if not all(value.requires_grad for value in graph.parameters):
        notes.append("some parameters need no gradient; they are not updated and have no optimizer state")
    notes.append(f"priced with the optimizer {graph.optimizer}")
    return tuple(notes)


def _inference_notes(graph: OpGraph) -> Iterator[str]:
    """What the figures of an inference plan stand for."""
    yield "forward alone, in evaluation mode: no gradients, no optimizer, nothing kept for backward"
    held = cache_bytes(graph)
    if held:
        yield (
            f"every step reads the cache, {format_bytes(held)} over all samples, which stays on the devices; adding "
            "the new keys and values to it, choosing tokens and batching requests are up to a serving engine"
        )


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
