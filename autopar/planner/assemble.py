"""Puts a rank's executor together: `rewrite` makes its program, `runtime` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autopar.ir.graph import OpGraph
from autopar.ir.solution import Decisions

if TYPE_CHECKING:
    from torch import Tensor

    from autopar.runtime.executor import Executor, RunOptions
    from autopar.runtime.mesh import RankMesh


def make_executor(
    graph: OpGraph,
    decisions: Decisions,
    state: Mapping[str, Tensor],
    mesh: RankMesh,
    options: RunOptions | None = None,
) -> Executor:
    """Executor of one rank.

    Args:
        graph: captured at the microbatch size.
        decisions: of a plan for this graph.
        state: whole parameters, buffers and constants by value name, equal on all ranks.
        mesh: from `join_plan` or `serial_mesh`.
        options: of the run.

    Raises:
        RewriteError: if the decisions do not fit the graph.
    """
    from autopar.rewrite.program import build_stage
    from autopar.runtime.executor import Executor, RunOptions

    options = options or RunOptions()
    programs = [
        build_stage(graph, decisions, stage, mesh.coordinate, axes=mesh.axes, device=options.device, seed=options.seed)
        for stage in range(mesh.stage, len(decisions.stages), mesh.num_stages)
    ]
    return Executor(graph, decisions, programs, state, mesh=mesh, options=options)


def make_serial_executor(
    graph: OpGraph, state: Mapping[str, Tensor], options: RunOptions | None = None, num_microbatches: int = 1
) -> Executor:
    """Executor of the whole graph on this process alone, nothing split."""
    from autopar.rewrite.program import serial_decisions
    from autopar.runtime.mesh import serial_mesh

    return make_executor(graph, serial_decisions(graph, num_microbatches), state, serial_mesh(), options)
