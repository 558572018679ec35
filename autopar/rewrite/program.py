"""Builds the `StageProgram` of a rank from graph and decisions; and the serial program, the same on one device.

Values pass between segments, and over the cuts, in their kept placement (`rewrite.layout`).
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.partition import StagePart, partition
from autopar.ir.pipeline import splits_backward
from autopar.ir.placement import INVARIANT, Sharding
from autopar.ir.solution import Decisions, StageChoice
from autopar.ir.strategy import ParameterAxisStrategy
from autopar.program.collectives import AxisGroup
from autopar.program.delayed import DelayedWeights
from autopar.program.gathered import GatherScope
from autopar.program.recompute import Keeper
from autopar.program.stage import BoundaryTensor, Segment, StageProgram
from autopar.program.stream import StreamState
from autopar.rewrite.check import check_segment
from autopar.rewrite.layout import Layout, layout_of
from autopar.rewrite.segment import Attributes, SegmentBuilder, describe
from autopar.rules.outputs import left_as
from autopar.rules.recompute import BlockRecompute, recompute_by_block
from autopar.rules.strategies import axis_strategies
from autopar.rules.weights import delayed_products


def build_stage(
    graph: OpGraph,
    decisions: Decisions,
    stage: int,
    coordinate: tuple[int, ...],
    *,
    axes: Sequence[AxisGroup] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> StageProgram:
    """The program of one rank.

    Args:
        graph: captured at the microbatch size.
        decisions: of a plan for this graph.
        stage: from 0.
        coordinate: of the rank in the stage mesh.
        axes: process groups by mesh axis; without them the program can be read but not run (on more than one rank).
        device: where the program runs.
        seed: of the random streams.

    Raises:
        RewriteError: if the decisions do not fit the graph.
    """
    decisions = decisions.at(stage)
    layout = layout_of(graph, decisions)
    part = partition(graph, decisions.stages)[stage]
    attributes = Attributes(
        tuple(axes or _unbound_axes(decisions, coordinate)),
        StreamState(seed, samples=graph.batch_size),
        GatherScope(),
        Keeper(),
        DelayedWeights(),
        device,
    )
    shared, segments = _segments(layout, part, attributes, stage)
    outside = {o: tuple(n for n in part.outside if graph.values[n].origin == o) for o in _OUTSIDE}
    return StageProgram(
        stage=stage,
        num_stages=len(decisions.stages),
        coordinate=coordinate,
        shared=shared,
        segments=segments,
        received=_boundary(layout, part.received),
        sent=_boundary(layout, part.sent),
        parameters=outside["parameter"],
        buffers=outside["buffer"],
        constants=outside["constant"],
        inputs=outside["input"],
        updated_buffers=tuple(n for n in outside["buffer"] if any(n in op.mutates for op in part.ops)),
        stream=attributes.stream,
        scope=attributes.scope,
        keeper=attributes.keeper,
        delayed=attributes.delayed,
        axes=attributes.axes,
        entering={name: layout.entered(name) for name in outside["input"] if graph.is_inference},
        leaving=_leaving(layout, part),
    )


def _leaving(layout: Layout, part: StagePart) -> dict[str, Sharding]:
    """Outputs of an inference graph that the stage makes, in the order of the model, as they leave."""
    made = {name for op in part.ops for name in op.outputs}
    outputs = (output for output in layout.graph.outputs if output.value in made)
    return {output.value: left_as(layout.kept(output.value), output) for output in outputs}


_OUTSIDE = ("parameter", "buffer", "constant", "input")


def _unbound_axes(decisions: Decisions, coordinate: tuple[int, ...]) -> tuple[AxisGroup, ...]:
    return tuple(AxisGroup(a.name, a.size, i) for a, i in zip(decisions.mesh.axes, coordinate, strict=True))


def _boundary(layout: Layout, names: Sequence[str]) -> tuple[BoundaryTensor, ...]:
    values = layout.graph.values
    return tuple(
        BoundaryTensor(n, layout.local_shape(n), v.meta.dtype, v.requires_grad, tuple(v.meta.shape), layout.kept(n))
        for n, v in ((name, values[name]) for name in names)
    )


def _segments(
    layout: Layout, part: StagePart, attributes: Attributes, stage: int
) -> tuple[Segment | None, tuple[Segment, ...]]:
    """Build and check each piece; each returns what later pieces, or the next stage, read."""
    choice, is_last = layout.decisions.stages[stage], stage == len(layout.decisions.stages) - 1
    again = recompute_by_block(layout.graph, choice.recompute)
    delays = _delayed(layout, part)
    pieces = [("shared", part.shared), *part.blocks]
    reads: list[set[str]] = [{name for op in ops for name in op.inputs} for _, ops in pieces]
    built = []
    for index, (name, ops) in enumerate(pieces):
        later = {n for names in reads[index + 1 :] for n in names} | set(part.sent)
        with_loss = is_last and index == len(pieces) - 1 and not layout.graph.is_inference
        if is_last and not with_loss:
            later.add(layout.graph.loss)
        made = {n for op in ops for n in op.outputs}
        leaving = [output for output in layout.graph.outputs if output.value in made and index]
        outputs = [n for n in layout.graph.values if n in made and n in later]
        recompute = again.get(choice.start + index - 1, BlockRecompute()) if index else BlockRecompute()
        segment = SegmentBuilder(layout, attributes, recompute, delays).build(
            name, ops, outputs, with_loss=with_loss, leaving=leaving
        )
        check_segment(segment, ops, layout)
        built.append(segment)
    return (built[0] if part.shared else None), tuple(built[1:])


def _delayed(layout: Layout, part: StagePart) -> frozenset[str]:
    """Products whose weight gradients wait for their turn in the schedule."""
    decisions = layout.decisions
    if not splits_backward(decisions.schedule, decisions.num_ranks):
        return frozenset()
    return delayed_products(part.ops, layout.graph.values, decisions.parameters)


def serial_decisions(graph: OpGraph, num_microbatches: int = 1) -> Decisions:
    """One device, one stage, nothing split."""
    mesh = StageMesh(())
    return Decisions(
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule="gpipe",
        stages=(StageChoice(0, len(graph.blocks), "none"),),
        ops={op.name: () for op in graph.ops},
        hubs={},
        parameters={value.name: () for value in graph.parameters},
    )


def replicated_decisions(graph: OpGraph, mesh: StageMesh, num_microbatches: int = 1) -> Decisions:
    """One stage in which every device does everything: the neutral starting point for plans made by hand."""
    whole = (INVARIANT,) * len(mesh.axes)
    keep = ParameterAxisStrategy("invariant", INVARIANT, INVARIANT, INVARIANT)
    return Decisions(
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule="gpipe",
        stages=(StageChoice(0, len(graph.blocks), "none"),),
        ops={op.name: tuple(axis_strategies(op, graph.values)[0] for _ in mesh.axes) for op in graph.ops},
        hubs=dict.fromkeys(hub_values(graph), whole),
        parameters={value.name: tuple(keep for _ in mesh.axes) for value in graph.parameters},
    )


def hub_values(graph: OpGraph) -> tuple[str, ...]:
    """Values kept in one placement of their own: read at least twice, and not parameters; in graph order."""
    reads = [name for op in graph.ops for name in op.inputs]
    counts = dict.fromkeys(graph.values, 0)
    for name in reads:
        counts[name] += 1
    return tuple(name for name, count in counts.items() if count >= 2 and graph.values[name].origin != "parameter")


def serial_program(graph: OpGraph, *, device: str = "cpu", seed: int = 0) -> StageProgram:
    """The whole graph on one device: the reference that `verify` compares with."""
    return build_stage(graph, serial_decisions(graph), 0, (), device=device, seed=seed)


def program_text(program: StageProgram, graph: OpGraph, decisions: Decisions) -> str:
    """The program as one reads it: a line per node with its call, placement, strategy and source."""
    strategies = {name: "/".join(axis.label for axis in strategy) for name, strategy in decisions.ops.items()}
    where = {op.name: " ".join(part for part in (op.module_path, op.source) if part) for op in graph.ops}
    lines = [f"stage {program.stage} of {program.num_stages}, coordinate {program.coordinate}"]
    for segment in (program.shared, *program.segments):
        if segment is None:
            continue
        lines.append(f"\n{segment.name}({', '.join(segment.inputs)}) -> {', '.join(segment.outputs)}")
        for node in segment.nodes:
            if node.op == "call_function":
                call = node.format_node(include_tensor_metadata=False) or ""
                shown = call.split("[num_users", 1)[0].rstrip(" :").lstrip("%")
                target = getattr(node.target, "__name__", str(node.target))
                arguments = ", ".join(map(str, (*node.args, *(f"{k}={v}" for k, v in node.kwargs.items()))))
                note = "  ".join(p for p in (describe(node, strategies), where.get(node.meta.get("op", ""), "")) if p)
                lines.append(f"  {shown} = {target}({arguments})" + (f"  # {note}" if note else ""))
    return "\n".join(lines)
