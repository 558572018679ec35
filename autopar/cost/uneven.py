"""Prices of plans whose stages have meshes of their own.

Each stage is priced by the table of its mesh. There a value that enters it counts as held in the placement in which it
crosses the cut. At the cut itself every rank of the stage before sends, all at once, the boxes that ranks of the stage
after need (`rules.resharding`): that takes as long as the rank that sends or receives most, in the direction that is
slower, and costs the joules of all bytes both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from autopar.cost.stages import SHARED, StageCost, Wire, stage_costs
from autopar.cost.table import CostTables
from autopar.errors import PlanMismatchError
from autopar.ir.cost import CostNode, CostTable
from autopar.ir.graph import OpGraph, Value
from autopar.ir.mesh import StageMesh
from autopar.ir.partition import partition
from autopar.ir.placement import Sharding, format_sharding, local_shape
from autopar.ir.solution import Decisions, StageChoice
from autopar.ir.strategy import Strategy, output_sharding
from autopar.rules.resharding import Held, most_moved, pieces


def uneven_stage_cost(tables: CostTables, table: CostTable, decisions: Decisions, stage: int) -> StageCost:
    """Sums of one stage.

    Args:
        table: of the stage's mesh, at the clock of its devices.

    Raises:
        PlanMismatchError: a decision is none of the choices that the stage's mesh allows.
    """
    choice = _Chosen(tables.graph, table, decisions, stage)
    own = choice.own()
    found = stage_costs(tables, table, decisions, choice=own, entering=choice.entering(own))[stage]
    if not found.times.forward_s + found.times.backward_s < float("inf"):
        raise PlanMismatchError(f"stage {stage}: something that enters it cannot take the form in which it is needed")
    values = tables.microbatch_values(table.num_microbatches)
    received = partition(tables.graph, decisions.stages)[stage].received
    found.received_bytes = sum(_local_bytes(values[n], decisions.hubs[n], table.mesh) for n in received)
    found.wire = _wire(tables, [values[n] for n in received], decisions, stage) if stage else None
    return found


def _local_bytes(value: Value, sharding: Sharding, mesh: StageMesh) -> float:
    local = local_shape(value.meta.shape, sharding, mesh.sizes)
    if local is None:
        raise PlanMismatchError(f"{value.name} does not divide as {format_sharding(sharding)} on {mesh.sizes}")
    return float(value.meta.with_shape(local).num_bytes)


def _wire(tables: CostTables, values: Sequence[Value], decisions: Decisions, stage: int) -> Wire:
    """What crosses the cut before a stage."""
    before, after = decisions.stage_meshes[stage - 1], decisions.stage_meshes[stage]
    busiest, total, pairs = [0.0, 0.0], 0.0, set()
    for value in values:
        source, target = (Held(mesh, decisions.hubs[value.name]) for mesh in (before, after))
        ways = [(source, target)] + ([(target.dual, source.dual)] if value.requires_grad else [])
        size = value.meta.num_bytes / max(1, value.meta.numel)
        for way, (sends, takes) in enumerate(ways):
            moved = pieces(tuple(value.meta.shape), sends, takes)
            if moved is None:
                raise PlanMismatchError(f"{value.name} does not divide into what crosses the cut before stage {stage}")
            busiest[way] += size * most_moved(moved, sends.mesh.num_devices, takes.mesh.num_devices)
            total += size * sum(piece.num_elements for piece in moved)
            pairs |= {(p.sender, p.receiver) if way == 0 else (p.receiver, p.sender) for p in moved}
    return Wire(max(busiest), total, _is_near(tables, decisions, stage, pairs))


def _is_near(tables: CostTables, decisions: Decisions, stage: int, pairs: set[tuple[int, int]]) -> bool:
    """All pairs of ranks, each counted from the first of its stage, share a node."""
    width = tables.cluster.gpus_per_node
    first, second = decisions.first_gpu(stage - 1), decisions.first_gpu(stage)
    return all((first + a) // width == (second + b) // width for a, b in pairs)


@dataclass(frozen=True)
class _Chosen:
    """Choices of a table's nodes as one stage sees them."""

    graph: OpGraph
    table: CostTable
    decisions: Decisions
    stage: int

    @property
    def _blocks(self) -> StageChoice:
        return self.decisions.stages[self.stage]

    def own(self) -> tuple[int, ...]:
        """Index of every node's choice; of nodes that the stage does not have, some index."""
        return tuple(self._of(node) for node in self.table.nodes)

    def _of(self, node: CostNode) -> int:
        inside = [
            name
            for name, block in zip(node.names, node.blocks, strict=True)
            if block == SHARED or self._blocks.start <= block < self._blocks.stop
        ]
        found = self._index(node, (inside or node.names)[0])
        if found is None and inside:
            raise PlanMismatchError(
                f"the plan's choice for {inside[0]!r} is not one this model and the mesh of stage {self.stage} allow"
            )
        return found or 0

    def _index(self, node: CostNode, name: str) -> int | None:
        decided = _decided(self.decisions, node.kind).get(name)
        if decided is None:
            return 0 if len(node.choices) == 1 else None
        return next((i for i, choice in enumerate(node.choices) if self._agrees(choice, decided)), None)

    def _agrees(self, one: Sequence[object], other: Sequence[object]) -> bool:
        """On axes of one rank all choices are the same."""
        return all(size == 1 or a == b for size, a, b in zip(self.table.mesh.sizes, one, other, strict=True))

    def entering(self, own: Sequence[int]) -> dict[tuple[int, int], int]:
        """(node, block of an earlier stage) -> choice under which its value crosses the cut before the stage.

        Raises:
            PlanMismatchError: there is none.
        """
        received = partition(self.graph, self.decisions.stages)[self.stage].received
        makers = {name: op for name, op in self.graph.producers().items() if name in set(received)}
        found = {}
        for index, node, name, block in self._makers_outside({op.name for op in makers.values()} | set(received)):
            if node.kind == "hub":
                wanted = {0: self.decisions.hubs[name]}
            else:
                op = next(op for op in makers.values() if op.name == name)
                wanted = {i: self.decisions.hubs[n] for i, n in enumerate(op.outputs) if n in makers}
            fits = [i for i, choice in enumerate(node.choices) if self._gives(node.kind, choice, wanted)]
            if not fits:
                raise PlanMismatchError(f"stage {self.stage} cannot take {name!r} in the form in which it crosses")
            found[index, block] = own[index] if own[index] in fits else fits[0]
        return found

    def _makers_outside(self, names: set[str]) -> Iterator[tuple[int, CostNode, str, int]]:
        for index, node in enumerate(self.table.nodes):
            if node.kind != "param":
                pairs = zip(node.names, node.blocks, strict=True)
                yield from ((index, node, n, b) for n, b in pairs if n in names and 0 <= b < self._blocks.start)

    def _gives(self, kind: str, choice: Strategy | Sharding, wanted: Mapping[int, Sharding]) -> bool:
        """The choice holds, or makes, what is wanted of each output."""
        if kind == "hub":
            return self._agrees(choice, wanted[0])
        strategy = cast(Strategy, choice)
        return all(self._agrees(output_sharding(strategy, i), form) for i, form in wanted.items())


def _decided(decisions: Decisions, kind: str) -> Mapping[str, Sequence[object]]:
    return {"op": decisions.ops, "hub": decisions.hubs, "param": decisions.parameters}[kind]
