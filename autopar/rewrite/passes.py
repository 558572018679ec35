"""The program of a stage that ends in passes: the blocks before the switch, and those behind for one pass.

The two are built like neighbouring stages, from the graph at the size of a microbatch and at that of a pass. What
crosses the switch leaves the first with the samples of this rank, and enters the second with those of all ranks of the
axis; the runtime moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from autopar.errors import RewriteError
from autopar.ir.graph import OpGraph
from autopar.ir.partition import partition
from autopar.ir.passes import samples_of
from autopar.ir.placement import REPLICATE, Sharding
from autopar.ir.solution import Decisions
from autopar.program.collectives import AxisGroup
from autopar.program.stage import Behind, StageProgram
from autopar.rewrite.layout import layout_of
from autopar.rewrite.program import build_stage


def build_in_passes(
    graph: OpGraph,
    behind: OpGraph,
    decisions: Decisions,
    coordinate: tuple[int, ...],
    *,
    axes: Sequence[AxisGroup],
    device: str = "cpu",
    seed: int = 0,
) -> StageProgram:
    """The program of one rank of the last stage.

    Args:
        graph, behind: captured at the size of a microbatch and of a pass.
        decisions: of a plan with passes.
        coordinate, axes, device, seed: as for `build_stage`.

    Raises:
        RewriteError: if the decisions do not fit the graphs.
    """
    passes, last = decisions.passes, len(decisions.stages) - 1
    if passes is None:
        raise AssertionError("a plan without passes is built by build_stage")
    before = decisions.split_at_switch()
    at = [axis.name for axis in decisions.mesh.axes].index(passes.axis)
    forms = crossing_forms(graph, before)
    inside = replace(before, hubs={**before.hubs, **{name: _gathered(form, at) for name, form in forms.items()}})
    head = build_stage(graph, before, last, coordinate, axes=axes, device=device, seed=seed)
    part = build_stage(without_updates(behind), inside, last + 1, coordinate, axes=axes, device=device, seed=seed)
    if [tensor.name for tensor in head.sent] != [tensor.name for tensor in part.received]:
        raise RewriteError(f"the blocks before and behind block {passes.block} do not meet in the same values")
    outer = _outer(next(iter(forms.values())), at, decisions.mesh.sizes)
    ranks = decisions.mesh.sizes[at]
    runs = tuple(samples_of(passes, i, samples=graph.batch_size, ranks=ranks, outer=outer) for i in range(passes.count))
    dims = tuple(forms[tensor.name][at].dim for tensor in head.sent)
    read = {
        name: tuple(value for value in graph.values if value in {*getattr(head, name), *getattr(part, name)})
        for name in ("parameters", "buffers", "constants", "inputs")
    }
    return replace(
        head, stage=last, num_stages=last + 1, behind=Behind(part, passes, axes[at], dims, runs),
        parameters=read["parameters"], buffers=read["buffers"], constants=read["constants"], inputs=read["inputs"],
    )  # fmt: skip


def crossing_forms(graph: OpGraph, split: Decisions) -> dict[str, Sharding]:
    """Placements in which the values that cross the switch are kept before it."""
    layout = layout_of(graph, split)
    return {name: layout.kept(name) for name in partition(graph, split.stages)[-1].received}


def without_updates(graph: OpGraph) -> OpGraph:
    """The graph without shared ops that update buffers: those before the switch do it, once a microbatch."""
    return replace(graph, ops=tuple(op for op in graph.ops if not (op.is_shared and op.mutates)))


def _gathered(form: Sharding, at: int) -> Sharding:
    if not form[at].is_shard or any(p == form[at] for p in form[at + 1 :]):
        raise RewriteError("a value that crosses the switch is not split by samples over the passes' axis last")
    return (*form[:at], REPLICATE, *form[at + 1 :])


def _outer(form: Sharding, at: int, sizes: Sequence[int]) -> int:
    """Ranks of the axes that split the same dim before the passes' axis does."""
    return math.prod(size for p, size in zip(form[:at], sizes[:at], strict=True) if p == form[at])
