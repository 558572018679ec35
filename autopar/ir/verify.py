"""Verify: is a plan consistent in itself, and does it fit a graph and a cluster?

`verify` returns every `Issue` it finds and raises nothing; `check` raises on the first few. Not checked here: that
the program computes the right numbers (`autopar verify` runs it), and that a strategy is the right mathematics
for its op (the rules are, and the rewrite refuses strategies they do not offer).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from autopar.errors import PlanMismatchError
from autopar.ir.cost import Device
from autopar.ir.graph import Op, OpGraph
from autopar.ir.inference import is_inference
from autopar.ir.mesh import StageMesh
from autopar.ir.offload import NOWHERE
from autopar.ir.partition import partition
from autopar.ir.passes import ORDERS, TURNS, UPDATES
from autopar.ir.pipeline import FORWARD_ONLY, SCHEDULES, check_interleave, check_zero_bubble, splits_backward
from autopar.ir.placement import Sharding, format_sharding, local_shape
from autopar.ir.plan import SCHEMA_VERSION, Plan, Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.solution import RECOMPUTE, STATUSES, Decisions, Limits
from autopar.ir.strategy import (
    Strategy,
    exposed_sharding,
    input_sharding,
    optimizer_sharding,
    output_sharding,
    storage_sharding,
)

SHOWN_ISSUES = 5
UNEVEN_SCHEDULES = ("1f1b", "gpipe")
"""Those that stages with meshes of their own run."""
LIMIT_SLACK = 1e-6
"""Relative excess over a limit that counts as rounding."""


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing that is wrong: where in the plan (JSON path), and what."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def verify(plan: Plan, graph: OpGraph | None = None, device: Device | None = None) -> list[Issue]:
    """All issues of a plan, against itself and against what is given.

    Args:
        graph: captured at the plan's global batch size.
        device: the cluster that the plan is to run on.
    """
    issues = [*_figures(plan), *_skeleton(plan), *_limits(plan)]
    if issues:
        return issues
    if graph is not None:
        issues += [*_stage_cover(plan.decisions, graph), *_batch(plan, graph), *_names(plan.decisions, graph)]
        issues += [] if issues else _shardings(plan.decisions, graph)
    if device is not None:
        issues += _device_fit(plan, device)
    return issues


def check(plan: Plan, graph: OpGraph | None = None, device: Device | None = None, name: str = "the plan") -> None:
    """Raise PlanMismatchError if `verify` finds anything; the message lists the first few issues."""
    issues = verify(plan, graph, device)
    if not issues:
        return
    lines = [f"  at {issue}" for issue in issues[:SHOWN_ISSUES]]
    if len(issues) > SHOWN_ISSUES:
        lines.append(f"  and {len(issues) - SHOWN_ISSUES} more")
    raise PlanMismatchError(
        "\n".join([f"{name} does not hold together", *lines, "  make it again with 'autopar plan'"])
    )


def _figures(plan: Plan) -> Iterator[Issue]:
    """Predicted figures: none negative, units as the schema says."""
    predicted = plan.predicted
    named: list[tuple[str, Quantity, str]] = [
        ("step_time_s", predicted.step_time_s, "s"),
        ("energy_j", predicted.energy_j, "J"),
        ("average_power_w", predicted.average_power_w, "W"),
        ("peak_power_w", predicted.peak_power_w, "W"),
    ]
    named += [(f"peak_memory_bytes[{i}]", q, "B") for i, q in enumerate(predicted.peak_memory_bytes)]
    for i, stage in enumerate(predicted.stages):
        named += [(f"stages[{i}].{n}", getattr(stage, n), "s") for n in ("forward_s", "backward_s", "step_s")]
        named.append((f"stages[{i}].peak_memory_bytes", stage.peak_memory_bytes, "B"))
    for path, quantity, unit in named:
        if quantity.unit != unit:
            yield Issue(f"$.predicted.{path}.unit", f"expected {unit!r}, found {quantity.unit!r}")
        if not all(math.isfinite(x) and x >= 0 for x in (quantity.low, quantity.value, quantity.high)):
            yield Issue(f"$.predicted.{path}", f"not a finite figure of at least 0: {quantity.value}")
    if plan.solver.status not in STATUSES:
        yield Issue("$.solver.status", f"expected one of {', '.join(STATUSES)}, found {plan.solver.status!r}")


def limited_figures(prediction: Prediction) -> dict[str, float]:
    """The predicted figure that each field of `Limits` bounds."""
    return {
        "deadline_s": prediction.step_time_s.value,
        "energy_j": prediction.energy_j.value,
        "average_power_w": prediction.average_power_w.value,
        "peak_power_w": prediction.peak_power_w.value,
    }


def broken_limits(prediction: Prediction, limits: Limits) -> tuple[str, ...]:
    """Names of the limits that predicted figures break."""
    return tuple(
        name
        for name, figure in limited_figures(prediction).items()
        if (most := getattr(limits, name)) is not None and figure > most * (1 + LIMIT_SLACK)
    )


def _limits(plan: Plan) -> Iterator[Issue]:
    """Weights of the objective, and whether the predicted figures keep the limits."""
    objective = plan.objective
    weights = (objective.time_weight, objective.energy_weight, objective.gpu_second_weight)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        yield Issue("$.objective", f"expected weights of at least 0, found {', '.join(f'{w:g}' for w in weights)}")
    if not (math.isfinite(objective.pue) and objective.pue >= 1):
        yield Issue("$.objective.pue", f"expected at least 1, found {objective.pue:g}")
    if not (math.isfinite(plan.decisions.pace_s) and plan.decisions.pace_s >= 0):
        yield Issue("$.decisions.pace_s", f"expected at least 0, found {plan.decisions.pace_s}")
    figures = limited_figures(plan.predicted)
    for name in broken_limits(plan.predicted, plan.limits):
        problem = f"the plan's figure, {figures[name]:.6g}, lies above this limit"
        yield Issue(f"$.limits.{name}", problem)


def _skeleton(plan: Plan) -> Iterator[Issue]:
    """Mesh, stages, schedule and counts, without the graph."""
    decisions, num_stages = plan.decisions, len(plan.decisions.stages)
    if plan.schema_version != SCHEMA_VERSION:
        yield Issue("$.schema_version", f"expected {SCHEMA_VERSION}, found {plan.schema_version}")
    counts = {"model.batch_size": plan.model.batch_size, "decisions.num_microbatches": decisions.num_microbatches}
    counts |= {"cluster.num_gpus": plan.cluster.num_gpus, "cluster.gpus_per_node": plan.cluster.gpus_per_node}
    counts |= {"cluster.memory_bytes": plan.cluster.memory_bytes}
    for path, count in counts.items():
        if count < 1:
            yield Issue(f"$.{path}", f"expected at least 1, found {count}")
            return
    if not decisions.mesh.axes or len({axis.name for axis in decisions.mesh.axes}) != len(decisions.mesh.axes):
        yield Issue("$.decisions.mesh", "expected axes with different names")
    if not decisions.stages:
        yield Issue("$.decisions.stages", "a plan needs at least one stage")
    if decisions.interleave < 1 or num_stages % max(1, decisions.interleave):
        problem = f"{num_stages} chunks do not lie on ranks of {decisions.interleave} each"
        yield Issue("$.decisions.interleave", problem)
        return
    if decisions.num_gpus > plan.cluster.num_gpus:
        widths = " and ".join(str(width) for width in dict.fromkeys(mesh.num_devices for mesh in decisions.meshes))
        used = f"{num_stages} stages of {widths}"
        yield Issue("$.decisions", f"{used} are more GPUs than the {plan.cluster.num_gpus} of $.cluster.num_gpus")
    if plan.model.batch_size % decisions.num_microbatches:
        problem = f"a batch of {plan.model.batch_size} does not divide into {decisions.num_microbatches}"
        yield Issue("$.decisions.num_microbatches", problem)
    schedules = (FORWARD_ONLY,) if is_inference(plan) else SCHEDULES
    if decisions.schedule not in schedules:
        yield Issue("$.decisions.schedule", f"expected one of {', '.join(schedules)}, found {decisions.schedule!r}")
    yield from _zero_bubble(decisions)
    yield from _interleave(decisions)
    yield from _passes(plan)
    yield from _stage_meshes(plan)
    yield from _stages(plan)
    yield from _types(plan)


def _stage_meshes(plan: Plan) -> Iterator[Issue]:
    """Meshes of their own that stages have, and what does not go with them."""
    decisions, path = plan.decisions, "$.decisions.stage_meshes"
    if not decisions.stage_meshes:
        return
    if len(decisions.stage_meshes) != len(decisions.stages) or decisions.stage_meshes[0] != decisions.mesh:
        yield Issue(path, f"expected one mesh for each of {len(decisions.stages)} stages, the first that of the plan")
    if len({tuple(axis.name for axis in mesh.axes) for mesh in decisions.stage_meshes}) != 1:
        yield Issue(path, "expected equal names of axes on every stage")
    others = {
        "several chunks per rank": decisions.interleave > 1,
        f"the schedule {decisions.schedule}": decisions.schedule not in UNEVEN_SCHEDULES,
        "offload": bool(decisions.offload),
        "several types of GPU": plan.cluster.description is not None,
    }
    for what in (words for words, is_there in others.items() if is_there):
        yield Issue(path, f"stages with meshes of their own do not go with {what}")


def _zero_bubble(decisions: Decisions) -> Iterator[Issue]:
    try:
        check_zero_bubble(decisions.num_ranks, decisions.num_microbatches, decisions.schedule)
    except ValueError as error:
        yield Issue("$.decisions.num_microbatches", str(error))


def _interleave(decisions: Decisions) -> Iterator[Issue]:
    """Whether chunks can take turns, and whether those of one rank agree about the device they share."""
    if decisions.interleave == 1:
        return
    num_ranks = decisions.num_ranks
    try:
        check_interleave(num_ranks, decisions.num_microbatches, decisions.schedule, decisions.interleave)
    except ValueError as error:
        yield Issue("$.decisions.interleave", str(error))
    if num_ranks < 2:
        yield Issue("$.decisions.interleave", "chunks take turns on at least two ranks, found one")
    for i, chunk in enumerate(decisions.stages[num_ranks:], num_ranks):
        first = decisions.stages[i % num_ranks]
        if (chunk.gpu, chunk.clock_hz) != (first.gpu, first.clock_hz):
            yield Issue(
                f"$.decisions.stages[{i}]", f"another type or clock than chunk {i % num_ranks} of the same rank"
            )


def _passes(plan: Plan) -> Iterator[Issue]:
    """Whether what runs in passes is there, and divides."""
    decisions, passes = plan.decisions, plan.decisions.passes
    if passes is None or not decisions.stages:
        return
    sizes, last = {axis.name: axis.size for axis in decisions.mesh.axes}, decisions.stages[-1]
    for name, known in (("order", ORDERS), ("update", UPDATES)):
        if getattr(passes, name) not in known:
            problem = f"expected one of {', '.join(known)}, found {getattr(passes, name)!r}"
            yield Issue(f"$.decisions.passes.{name}", problem)
    if not last.start < passes.block < last.stop:
        yield Issue("$.decisions.passes.block", f"block {passes.block} is not inside the last stage")
    if sizes.get(passes.axis, 1) < 2:
        yield Issue("$.decisions.passes.axis", f"the mesh has no axis {passes.axis!r} of several ranks")
    elif passes.order == TURNS and passes.count != sizes[passes.axis]:
        yield Issue("$.decisions.passes.count", f"by turns there is one pass per rank of {passes.axis!r}")
    if passes.count < 2 or plan.model.batch_size % (decisions.num_microbatches * max(1, passes.count)):
        yield Issue("$.decisions.passes.count", f"a microbatch does not divide into {passes.count} passes")
    is_split = splits_backward(decisions.schedule, decisions.num_ranks)
    if decisions.interleave > 1 or decisions.stage_meshes or is_split or decisions.offload:
        others = "chunks of one rank, stages of different meshes, zero-bubble, or offloading"
        yield Issue("$.decisions.passes", f"beside {others}")


def _types(plan: Plan) -> Iterator[Issue]:
    """Types of the stages: those of the cluster, with as many GPUs as it has of each."""
    description, stages = plan.cluster.description, plan.decisions.stages
    room = {} if description is None else {group.gpu: sum(group.nodes) for group in description.groups}
    for i, stage in enumerate(stages):
        if stage.gpu not in (room or {"", plan.cluster.gpu}):
            known = ", ".join(sorted(room)) or "no types to choose from"
            yield Issue(f"$.decisions.stages[{i}].gpu", f"{stage.gpu!r} is not in $.cluster.description: {known}")
    for gpu, count in sorted(room.items()):
        pairs = zip(stages, plan.decisions.meshes, strict=False)
        used = sum(mesh.num_devices for stage, mesh in pairs if stage.gpu == gpu)
        if used > count:
            yield Issue("$.decisions.stages", f"uses {used} x {gpu}, the cluster has {count}")


def _stages(plan: Plan) -> Iterator[Issue]:
    start = 0
    for i, stage in enumerate(plan.decisions.stages):
        if stage.start != start or stage.stop <= stage.start:
            problem = f"blocks {stage.start}..{stage.stop} do not continue at block {start}"
            yield Issue(f"$.decisions.stages[{i}]", problem)
        if stage.recompute not in RECOMPUTE:
            yield Issue(f"$.decisions.stages[{i}].recompute", f"expected one of {', '.join(RECOMPUTE)}")
        elif stage.recompute != "none" and plan.decisions.offload.activations != NOWHERE:
            problem = f"{stage.recompute!r} with activations offloaded: either of the two saves them"
            yield Issue(f"$.decisions.stages[{i}].recompute", problem)
        start = stage.stop
    counts = {"peak_memory_bytes": plan.decisions.num_ranks, "stages": len(plan.decisions.stages)}
    for name, expected in counts.items():
        found = len(getattr(plan.predicted, name))
        if found != expected:
            yield Issue(f"$.predicted.{name}", f"expected one entry per stage ({expected}), found {found}")


def _stage_cover(decisions: Decisions, graph: OpGraph) -> Iterator[Issue]:
    last = decisions.stages[-1].stop
    if last != len(graph.blocks):
        path = f"$.decisions.stages[{len(decisions.stages) - 1}].stop"
        yield Issue(path, f"the stages end at block {last}, the model at block {len(graph.blocks)}")


def _batch(plan: Plan, graph: OpGraph) -> Iterator[Issue]:
    if plan.model.batch_size != graph.batch_size:
        problem = f"made for a batch of {plan.model.batch_size}, the model's batch is {graph.batch_size}"
        yield Issue("$.model.batch_size", problem)


def _names(decisions: Decisions, graph: OpGraph) -> Iterator[Issue]:
    """Every op and parameter has exactly one strategy of the right arity, and nothing else has."""
    num_axes = len(decisions.mesh.axes)
    op_by_name = {op.name: op for op in graph.ops}
    parameters = {value.name for value in graph.parameters}
    yield from _same_names("ops", decisions.ops.keys(), op_by_name.keys(), "op")
    yield from _same_names("parameters", decisions.parameters.keys(), parameters, "parameter")
    for name in sorted(decisions.hubs.keys() - graph.values.keys()):
        yield Issue(f"$.decisions.hubs.{name}", "the model has no such value")
    for name in sorted(decisions.ops.keys() & op_by_name.keys()):
        problem = _arity(op_by_name[name], decisions.ops[name], num_axes)
        if problem:
            yield Issue(f"$.decisions.ops.{name}", problem)
    for kind, by_name in (("hubs", decisions.hubs), ("parameters", decisions.parameters)):
        for name, sharding in sorted(by_name.items()):
            if len(sharding) != num_axes:
                yield Issue(f"$.decisions.{kind}.{name}", f"{len(sharding)} placements on {num_axes} mesh axes")


def _same_names(kind: str, planned: Set[str], present: Set[str], noun: str) -> Iterator[Issue]:
    for name in sorted(planned - present):
        yield Issue(f"$.decisions.{kind}.{name}", f"the model has no such {noun}")
    for name in sorted(present - planned):
        yield Issue(f"$.decisions.{kind}.{name}", f"this {noun} of the model has no strategy")


def _arity(op: Op, strategy: Strategy, num_axes: int) -> str:
    if len(strategy) != num_axes:
        return f"{len(strategy)} labels on {num_axes} mesh axes"
    for axis in strategy:
        if len(axis.inputs) != len(op.inputs) or len(axis.outputs) != len(op.outputs):
            found, expected = f"{len(axis.inputs)} -> {len(axis.outputs)}", f"{len(op.inputs)} -> {len(op.outputs)}"
            return f"placements for {found} tensors, {op.target} has {expected}"
    return ""


def _shardings(decisions: Decisions, graph: OpGraph) -> list[Issue]:
    """Every sharding divides its tensor evenly. Shapes are those of one microbatch where they count samples."""
    issues, of_ops, of_values = [], *_meshes_of(decisions, graph)
    for op in graph.ops:
        strategy = decisions.ops[op.name]
        named = [(name, input_sharding(strategy, i)) for i, name in enumerate(op.inputs)]
        named += [(name, output_sharding(strategy, i)) for i, name in enumerate(op.outputs)]
        for name, sharding in named:
            problem = _indivisible(graph, of_ops[op.name], name, sharding)
            if problem:
                issues.append(Issue(f"$.decisions.ops.{op.name}", problem))
    for value in graph.parameters:
        strategies = decisions.parameters[value.name]
        for pick in (storage_sharding, exposed_sharding, optimizer_sharding):
            problem = _indivisible(graph, of_values.get(value.name, ()), value.name, pick(strategies))
            if problem:
                issues.append(Issue(f"$.decisions.parameters.{value.name}", problem))
    for name, hub in sorted(decisions.hubs.items()):
        problem = _indivisible(graph, of_values.get(name, ()), name, hub)
        if problem:
            issues.append(Issue(f"$.decisions.hubs.{name}", problem))
    return issues


Meshes = Mapping[str, tuple[StageMesh, ...]]


def _meshes_of(decisions: Decisions, graph: OpGraph) -> tuple[Meshes, Meshes]:
    """Meshes of the stages that run each op, and of those that hold each value."""
    if not decisions.stage_meshes:
        every = (decisions.mesh,)
        return dict.fromkeys((op.name for op in graph.ops), every), dict.fromkeys(graph.values, every)
    ops: dict[str, tuple[StageMesh, ...]] = {op.name: () for op in graph.ops}
    values: dict[str, tuple[StageMesh, ...]] = {}
    for mesh, part in zip(decisions.stage_meshes, partition(graph, decisions.stages), strict=True):
        ops |= {op.name: (*ops[op.name], mesh) for op in part.ops}
        held = {name for op in part.ops for name in (*op.inputs, *op.outputs)} | {*part.received, *part.sent}
        values |= {name: (*values.get(name, ()), mesh) for name in held}
    return ops, values


def _indivisible(graph: OpGraph, meshes: Iterable[StageMesh], name: str, sharding: Sharding) -> str:
    shape = graph.values[name].meta.shape
    for mesh in meshes:
        if local_shape(shape, sharding, mesh.sizes) is None:
            return f"{name} of shape {list(shape)} does not divide into {format_sharding(sharding)} on {mesh.sizes}"
    return ""


def _device_fit(plan: Plan, device: Device) -> Iterator[Issue]:
    if plan.decisions.num_gpus > device.num_gpus:
        yield Issue("$.decisions", f"uses {plan.decisions.num_gpus} GPUs, the cluster has {device.num_gpus}")
    for i, peak in enumerate(plan.predicted.peak_memory_bytes):
        if peak.value > device.memory_bytes:
            problem = f"{peak.value:.0f} bytes do not fit into {device.memory_bytes}"
            yield Issue(f"$.predicted.peak_memory_bytes[{i}]", problem)
