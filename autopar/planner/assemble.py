"""Puts a rank's executor together: `rewrite` makes its program, `runtime` runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autopar.ir.graph import OpGraph
from autopar.ir.partition import partition
from autopar.ir.placement import Sharding
from autopar.ir.solution import Decisions

if TYPE_CHECKING:
    from torch import Tensor

    from autopar.runtime.executor import Executor, RunOptions
    from autopar.runtime.feed import Form
    from autopar.runtime.inference import InferenceExecutor
    from autopar.runtime.mesh import RankMesh


def make_executor(
    graph: OpGraph,
    decisions: Decisions,
    state: Mapping[str, Tensor],
    mesh: RankMesh,
    options: RunOptions | None = None,
    *,
    behind: OpGraph | None = None,
) -> Executor:
    """Executor of one rank.

    Args:
        graph: captured at the microbatch size.
        decisions: of a plan for this graph.
        state: whole parameters, buffers and constants by value name, equal on all ranks.
        mesh: from `join_plan` or `serial_mesh`.
        options: of the run.
        behind: captured at the size of a pass, for a plan with passes.

    Raises:
        RewriteError: if the decisions do not fit the graph.
    """
    from autopar.errors import RewriteError
    from autopar.rewrite.passes import build_in_passes
    from autopar.rewrite.program import build_stage
    from autopar.runtime.compiled import compiled_program
    from autopar.runtime.executor import Executor, RunOptions

    options = options or RunOptions()
    place: dict[str, Any] = {"axes": mesh.axes, "device": options.device, "seed": options.seed}
    own = list(range(mesh.stage, len(decisions.stages), mesh.num_stages))
    in_passes = own[-1:] if decisions.passes is not None and own[-1] == len(decisions.stages) - 1 else []
    programs = [build_stage(graph, decisions, k, mesh.coordinate, **place) for k in own if k not in in_passes]
    if in_passes:
        if behind is None:
            raise RewriteError("the plan has passes: their program needs the model captured at the size of a pass")
        programs.append(build_in_passes(graph, behind, decisions, mesh.coordinate, **place))
    if options.compile:
        programs = [compiled_program(program, options.compile) for program in programs]
    return Executor(graph, decisions, programs, state, mesh=mesh, options=options)


def make_inference_executor(
    graph: OpGraph, decisions: Decisions, state: Mapping[str, Tensor], mesh: RankMesh, options: RunOptions
) -> InferenceExecutor:
    """Executor of one rank of a plan for inference; arguments as of `make_executor`."""
    from autopar.rewrite.program import build_stage
    from autopar.runtime.compiled import compiled_program
    from autopar.runtime.inference import InferenceExecutor

    program = build_stage(
        graph, decisions, mesh.stage, mesh.coordinate, axes=mesh.axes, device=options.device, seed=options.seed
    )
    if options.compile:
        program = compiled_program(program, options.compile)
    return InferenceExecutor(graph, decisions, program, state, mesh=mesh, options=options)


def make_serial_inference(
    graph: OpGraph, state: Mapping[str, Tensor], options: RunOptions, num_microbatches: int = 1
) -> InferenceExecutor:
    """Executor of the whole inference graph on this process alone."""
    from autopar.rewrite.program import serial_decisions
    from autopar.runtime.mesh import serial_mesh

    return make_inference_executor(graph, serial_decisions(graph, num_microbatches), state, serial_mesh(), options)


def make_serial_executor(
    graph: OpGraph, state: Mapping[str, Tensor], options: RunOptions | None = None, num_microbatches: int = 1
) -> Executor:
    """Executor of the whole graph on this process alone, nothing split."""
    from autopar.rewrite.program import serial_decisions
    from autopar.runtime.mesh import serial_mesh

    return make_executor(graph, serial_decisions(graph, num_microbatches), state, serial_mesh(), options)


def input_form(graph: OpGraph, decisions: Decisions, mesh: RankMesh, example: Sequence[Tensor]) -> Form:
    """The batches that a rank takes, and which of their samples it reads.

    Args:
        graph: captured at the microbatch size.
        decisions: of a plan for this graph.
        mesh: this rank's place.
        example: the whole example batch, one tensor per batch input in graph order.
    """
    from autopar.runtime.feed import Form

    count, inputs = decisions.num_microbatches, graph.outside("input")
    shapes = tuple(tuple(tensor.shape) for tensor in example)
    pairs = zip(inputs, example, strict=True)
    fixed = tuple(tensor if value.batch_dim is None else tensor[:0] for value, tensor in pairs)
    rows = read_rows(graph, decisions, stage=mesh.stage, num_stages=mesh.num_stages, coordinate=mesh.coordinate)
    return Form(
        shapes=shapes,
        dtypes=tuple(tensor.dtype for tensor in example),
        dims=tuple(value.batch_dim for value in inputs),
        fixed=fixed,
        rows=tuple(row + microbatch * graph.batch_size for microbatch in range(count) for row in rows),
    )


def read_rows(
    graph: OpGraph, decisions: Decisions, *, stage: int, num_stages: int, coordinate: Sequence[int]
) -> tuple[int, ...]:
    """Samples of a microbatch that the ops of a rank read, in order; () for a stage that reads no input.

    A rank that shares its samples with others in another way than in equal parts is given all of them; so is one that
    runs in passes, each of which has samples of all ranks.
    """
    from autopar.rewrite.layout import layout_of

    decisions = decisions.at(stage)
    layout, parts = layout_of(graph, decisions), partition(graph, decisions.stages)
    ops = [op for part in parts[stage::num_stages] for op in part.ops]
    if decisions.passes is not None and stage == num_stages - 1:
        return tuple(range(graph.batch_size))
    rows: set[int] = set()
    for value in graph.outside("input"):
        if value.batch_dim is None:
            continue
        kept = layout.kept(value.name)
        needed = {layout.needed(op, i) for op in ops for i, name in enumerate(op.inputs) if name == value.name}
        # A value that is kept in parts is gathered from the ranks that hold them, where an op wants more.
        for sharding in {kept} if needed and any(p.is_shard for p in kept) else needed:
            whole = range(value.meta.shape[value.batch_dim])
            rows |= set(_part_of(whole, sharding, value.batch_dim, decisions, coordinate))
    return tuple(sorted(rows))


def _part_of(whole: range, sharding: Sharding, dim: int, decisions: Decisions, coordinate: Sequence[int]) -> range:
    """The part of a dim that a rank holds: cut by one axis after the other."""
    for placement, size, index in zip(sharding, decisions.mesh.sizes, coordinate, strict=True):
        if placement.is_shard and placement.dim == dim:
            length = len(whole) // size
            whole = whole[index * length : (index + 1) * length]
    return whole
