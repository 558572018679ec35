"""Plans whose stages have meshes of their own, put together from plans on one mesh each.

Every stage takes what the plan on its mesh chose for its ops. What several stages read, a parameter, a shared value or
one that crosses a cut, has one placement for all of them, axis by axis that of the first of these stages, the maker
before the readers, where the axis is longer than one. Values that cross a cut are named as hubs, so that the stages on
both sides know in which placement they cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from autopar.ir.graph import Op, OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.partition import partition
from autopar.ir.placement import INVARIANT, Sharding
from autopar.ir.solution import Decisions, StageChoice
from autopar.ir.strategy import ParameterStrategy, Strategy, output_sharding

Each = TypeVar("Each")


def joined(graph: OpGraph, per_stage: Sequence[Decisions], stages: Sequence[StageChoice]) -> Decisions:
    """One plan of stages on the meshes of `per_stage`.

    Args:
        per_stage: for each stage, decisions for the whole graph, all on its mesh; of the same axes.
        stages: blocks of each stage.
    """
    return _Join(graph, per_stage, stages).make()


def of_active_axis(meshes: Sequence[StageMesh], choices: Sequence[Sequence[Each]]) -> tuple[Each, ...]:
    """Axis by axis, the entry of the first mesh in which the axis is longer than one; else of the first."""
    found = []
    for axis in range(len(meshes[0].sizes)):
        active = [c for mesh, c in zip(meshes, choices, strict=True) if mesh.sizes[axis] > 1]
        found.append((active or choices)[0][axis])
    return tuple(found)


class _Join:
    """Makes one plan."""

    def __init__(self, graph: OpGraph, per_stage: Sequence[Decisions], stages: Sequence[StageChoice]) -> None:
        self.graph, self.per_stage, self.stages = graph, per_stage, tuple(stages)
        self.meshes = tuple(decisions.mesh for decisions in per_stage)
        self.parts = partition(graph, stages)
        self.producers = graph.producers()
        self.stage_of = {block: k for k, stage in enumerate(stages) for block in range(stage.start, stage.stop)}

    def make(self) -> Decisions:
        """The plan."""
        return replace(
            self.per_stage[0],
            mesh=self.meshes[0],
            stages=self.stages,
            stage_meshes=self.meshes,
            ops={op.name: self._op(op) for op in self.graph.ops},
            hubs=self._hubs(),
            parameters={value.name: self._parameter(value.name) for value in self.graph.parameters},
        )

    def _merged(self, stages: Sequence[int], choices: Sequence[Sequence[Each]]) -> tuple[Each, ...]:
        return of_active_axis([self.meshes[k] for k in stages], choices)

    def _op(self, op: Op) -> Strategy:
        if not op.is_shared:
            return self.per_stage[self.stage_of[op.block]].ops[op.name]
        return self._merged(range(len(self.stages)), [decisions.ops[op.name] for decisions in self.per_stage])

    def _readers(self, name: str) -> list[int]:
        """Stages that read an outside value, or one that a shared op makes; all, if none does."""
        found = [k for k, part in enumerate(self.parts) if any(name in op.inputs for op in part.ops)]
        return found or list(range(len(self.stages)))

    def _parameter(self, name: str) -> ParameterStrategy:
        readers = self._readers(name)
        return self._merged(readers, [self.per_stage[k].parameters[name] for k in readers])

    def _hubs(self) -> dict[str, Sharding]:
        named = {name for decisions in self.per_stage for name in decisions.hubs}
        crossing = {name for part in self.parts for name in part.received}
        return {n: self._hub(n) for n in self.graph.values if n in crossing or (n in named and self._has_hub(n))}

    def _stages_of(self, name: str) -> list[int]:
        """Stages that hold a value: its maker, and all that it is sent through; of others those that read it."""
        op = self.producers.get(name)
        if op is None or op.is_shared:
            return self._readers(name)
        return [self.stage_of[op.block], *(k for k, part in enumerate(self.parts) if name in part.received)]

    def _has_hub(self, name: str) -> bool:
        return any(name in self.per_stage[k].hubs for k in self._stages_of(name))

    def _hub(self, name: str) -> Sharding:
        stages = self._stages_of(name)
        return self._merged(stages, [self._kept(self.per_stage[k], name) for k in stages])

    def _kept(self, decisions: Decisions, name: str) -> Sharding:
        op = self.producers.get(name)
        if name in decisions.hubs:
            return decisions.hubs[name]
        if op is None:
            return (INVARIANT,) * len(decisions.mesh.sizes)
        return output_sharding(decisions.ops[op.name], op.outputs.index(name))
