"""Partition: which ops each pipeline stage runs and which values cross between neighbours.

A stage runs the ops of its blocks, before them the shared ops that they need, and every shared op that updates a
buffer (so that buffers agree on all stages). A value crosses each cut between its producer's stage and the last
stage that reads it; stages in between pass it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import RewriteError
from autopar.ir.graph import Op, OpGraph
from autopar.ir.solution import StageChoice


@dataclass(frozen=True)
class StagePart:
    """One stage.

    Attributes:
        shared: shared ops, in execution order.
        blocks: (block name, its ops) in execution order.
        received, sent: values that cross the cut before and after, in graph order.
        outside: parameters, buffers, constants and inputs that the stage reads, in graph order.
    """

    shared: tuple[Op, ...]
    blocks: tuple[tuple[str, tuple[Op, ...]], ...]
    received: tuple[str, ...]
    sent: tuple[str, ...]
    outside: tuple[str, ...]

    @property
    def ops(self) -> tuple[Op, ...]:
        return (*self.shared, *(op for _, ops in self.blocks for op in ops))


def partition(graph: OpGraph, stages: Sequence[StageChoice]) -> tuple[StagePart, ...]:
    """One part per stage.

    Raises:
        RewriteError: if the stages do not cover the blocks in order.
    """
    _check_cover(graph, stages)
    cuts = _crossings(graph, stages)
    parts = []
    for index, stage in enumerate(stages):
        blocks = tuple((b.name, _block_ops(graph, b.index)) for b in graph.blocks[stage.start : stage.stop])
        own = [op for _, ops in blocks for op in ops]
        shared = _shared_ops(graph, own)
        reads = {name for op in (*shared, *own) for name in op.inputs}
        outside = tuple(v.name for v in graph.values.values() if v.origin != "op" and v.name in reads)
        parts.append(StagePart(shared, blocks, cuts[index], cuts[index + 1], outside))
    return tuple(parts)


def _check_cover(graph: OpGraph, stages: Sequence[StageChoice]) -> None:
    bounds = [0, *(stage.stop for stage in stages)]
    starts = [stage.start for stage in stages]
    if starts != bounds[:-1] or bounds[-1] != len(graph.blocks) or any(s.start >= s.stop for s in stages):
        shown = ", ".join(f"{s.start}..{s.stop}" for s in stages)
        raise RewriteError(f"stages {shown} do not cover blocks 0..{len(graph.blocks)} in order")


def _block_ops(graph: OpGraph, index: int) -> tuple[Op, ...]:
    return tuple(op for op in graph.ops if op.block == index and not op.is_shared)


def _shared_ops(graph: OpGraph, own: Sequence[Op]) -> tuple[Op, ...]:
    """Shared ops that `own` needs, directly or through one another, and those that update buffers."""
    needed = {name for op in own for name in op.inputs}
    found: list[Op] = []
    for op in reversed(graph.ops):
        if op.is_shared and (op.mutates or needed & set(op.outputs)):
            found.append(op)
            needed |= set(op.inputs)
    return tuple(reversed(found))


def _crossings(graph: OpGraph, stages: Sequence[StageChoice]) -> list[tuple[str, ...]]:
    """Values that cross each cut; entry k is the cut before stage k, and both ends are empty."""
    stage_of_block = {block: k for k, stage in enumerate(stages) for block in range(stage.start, stage.stop)}
    first = {name: stage_of_block[op.block] for op in graph.ops if not op.is_shared for name in op.outputs}
    last: dict[str, int] = {graph.loss: len(stages) - 1} if graph.loss else {}
    for op in graph.ops:
        for name in op.inputs:
            if name in first and not op.is_shared:
                last[name] = max(last.get(name, 0), stage_of_block[op.block])
    return [
        tuple(n for n in graph.values if n in first and n in last and first[n] < cut <= last[n])
        for cut in range(len(stages) + 1)
    ]
