"""Decisions made by hand and at random: any choice that the rules admit must compute the serial step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from autopar.ir.graph import Op, OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.placement import Placement, Sharding, local_shape
from autopar.ir.solution import RECOMPUTE, Decisions, StageChoice
from autopar.ir.strategy import (
    AxisStrategy,
    ParameterStrategy,
    Strategy,
    exposed_sharding,
    input_sharding,
    optimizer_sharding,
    output_sharding,
    storage_sharding,
)
from autopar.rewrite.layout import layout_of
from autopar.rewrite.program import hub_values, replicated_decisions
from autopar.rules.batch import batch_dims, batch_strategy
from autopar.rules.parameters import parameter_axis_strategies
from autopar.rules.redistribute import redistribute_steps
from autopar.rules.strategies import axis_strategies, local_metas

Choose = Callable[[Op, int], AxisStrategy]
"""The strategy of an op on one axis."""


def cut_evenly(graph: OpGraph, num_stages: int, recompute: str = "none") -> tuple[StageChoice, ...]:
    """Blocks dealt to stages in order, as evenly as they go."""
    count = len(graph.blocks)
    bounds = [count * k // num_stages for k in range(num_stages + 1)]
    return tuple(StageChoice(a, b, recompute) for a, b in itertools.pairwise(bounds))


def random_decisions(
    graph: OpGraph, mesh: StageMesh, rng: random.Random, *, num_microbatches: int = 1, num_stages: int = 1
) -> Decisions:
    """A random admissible choice for every op, hub and parameter."""

    def choose(op: Op, axis: int) -> AxisStrategy:
        return rng.choice(axis_strategies(op, graph.values, mesh.sizes[axis]))

    recompute = rng.choice(("none", *RECOMPUTE))
    base = replicated_decisions(graph, mesh, num_microbatches)
    base = replace(
        base,
        schedule=rng.choice(("1f1b", "gpipe")),
        stages=cut_evenly(graph, num_stages, recompute),
        ops=_choose_ops(graph, mesh, choose, tries=30),
    )
    base = replace(base, hubs=_choose_hubs(graph, base, rng))
    return replace(base, parameters=_choose_parameters(graph, base, rng))


def chosen_decisions(graph: OpGraph, mesh: StageMesh, choose: Choose, label: str, num_microbatches: int) -> Decisions:
    """Decisions in which each op follows `choose`, and each parameter `label` where its consumers admit it."""
    base = replicated_decisions(graph, mesh, num_microbatches)
    base = replace(base, ops=_choose_ops(graph, mesh, choose, tries=1))
    base = replace(base, hubs=_choose_hubs(graph, base, random.Random(0)))
    return replace(base, parameters=_choose_parameters(graph, base, random.Random(0), label))


def data_parallel(graph: OpGraph, mesh: StageMesh, label: str = "replicated", num_microbatches: int = 1) -> Decisions:
    """The batch split on every axis."""
    dims = batch_dims(graph)

    def choose(op: Op, axis: int) -> AxisStrategy:
        found = batch_strategy(op, graph.values, dims, graph.batch_size)
        return found or axis_strategies(op, graph.values)[0]

    return chosen_decisions(graph, mesh, choose, label, num_microbatches)


def sequence_parallel(graph: OpGraph, mesh: StageMesh, label: str = "context", num_microbatches: int = 1) -> Decisions:
    """The batch split on the first axis, dim 1 of the inputs on the second, followed through every op.

    Args:
        label: attention's strategy: `context` gathers keys and values; `dim1` splits heads, between two exchanges.
    """
    dims, along = batch_dims(graph), sequence_strategies(graph, label)

    def choose(op: Op, axis: int) -> AxisStrategy:
        batch = batch_strategy(op, graph.values, dims, graph.batch_size)
        found = batch if axis == 0 else along.get(op.name)
        return found or axis_strategies(op, graph.values)[0]

    return chosen_decisions(graph, mesh, choose, "replicated", num_microbatches)


def sequence_strategies(graph: OpGraph, label: str) -> dict[str, AxisStrategy]:
    """The strategy of each op that splits its operands along the sequence; shared values are sliced as needed."""
    values = graph.values
    length = next(value.meta.shape[1] for value in graph.outside("input"))
    dims: dict[str, int] = {}
    chosen: dict[str, AxisStrategy] = {}

    def agrees(name: str, placement: Placement) -> bool:
        if values[name].requires_grad:
            return placement.dim == dims.get(name, -1)
        return not placement.is_shard or values[name].meta.shape[placement.dim] == length

    def fits(op: Op, strategy: AxisStrategy) -> bool:
        is_split = any(placement.is_shard for placement in strategy.inputs)
        return is_split and all(agrees(n, p) for n, p in zip(op.inputs, strategy.inputs, strict=True))

    for op in (op for op in graph.ops if not op.is_shared):
        options = axis_strategies(op, values)[1:]
        is_attention = op.target.startswith("aten.scaled_dot_product_attention")
        found = [s for s in options if (s.label == label if is_attention else fits(op, s))]
        if found:
            chosen[op.name] = found[0]
            dims |= {n: 2 if is_attention else p.dim for n, p in zip(op.outputs, found[0].outputs, strict=True)
                     if p.is_shard}  # fmt: skip
    return chosen


def expert_parallel(graph: OpGraph, mesh: StageMesh, labels: Sequence[str], num_microbatches: int = 1) -> Decisions:
    """The batch split on every axis, but experts as the label of the axis says; their weights are stored so."""
    base = data_parallel(graph, mesh, "replicated", num_microbatches)
    ops = dict(base.ops)
    parameters = dict(base.parameters)
    for op in (op for op in graph.ops if op.target == "autopar.moe_experts"):
        options = {s.label: s for s in axis_strategies(op, graph.values)}
        ops[op.name] = tuple(options[label] for label in labels)
        for i, name in enumerate(op.inputs):
            if graph.values[name].origin == "parameter":
                stored = {s.exposed: s for s in reversed(parameter_axis_strategies(graph.values[name]))}
                parameters[name] = tuple(stored[axis.inputs[i]] for axis in ops[op.name])
    chosen = replace(base, ops=ops, parameters=parameters)
    return replace(chosen, hubs=_choose_hubs(graph, chosen, random.Random(0)))


def tensor_parallel(graph: OpGraph, mesh: StageMesh, num_microbatches: int = 1) -> Decisions:
    """Every op that reads a parameter and works on it is split otherwise than by samples, where it divides."""
    dims = batch_dims(graph)

    def choose(op: Op, axis: int) -> AxisStrategy:
        batch = batch_strategy(op, graph.values, dims, graph.batch_size)
        others = [s for s in axis_strategies(op, graph.values, mesh.sizes[axis])[1:] if s != batch]
        return others[-1] if others else axis_strategies(op, graph.values)[0]

    return chosen_decisions(graph, mesh, choose, "sharded", num_microbatches)


def _choose_ops(graph: OpGraph, mesh: StageMesh, choose: Choose, tries: int) -> dict[str, Strategy]:
    """In execution order; a choice that does not divide, or that an operand cannot reach, is drawn again."""
    hubs = set(hub_values(graph))
    made: dict[str, Sharding] = {}
    chosen: dict[str, Strategy] = {}
    for op in graph.ops:
        whole = tuple(axis_strategies(op, graph.values)[0] for _ in mesh.axes)
        drawn = [tuple(choose(op, axis) for axis in range(len(mesh.axes))) for _ in range(tries)]
        strategy = next((s for s in (*drawn, whole) if _admissible(op, s, graph, mesh, hubs, made)), whole)
        chosen[op.name] = strategy
        made |= {name: output_sharding(strategy, i) for i, name in enumerate(op.outputs)}
    return chosen


def _admissible(  # noqa: PLR0917 - the state of one draw
    op: Op, strategy: Strategy, graph: OpGraph, mesh: StageMesh, hubs: set[str], made: dict[str, Sharding]
) -> bool:
    if local_metas(op, strategy, mesh.sizes, graph.values) is None:
        return False
    return all(
        name in hubs
        or name not in made
        or redistribute_steps(made[name], input_sharding(strategy, i), mesh.sizes, graph.values[name].requires_grad)
        is not None
        for i, name in enumerate(op.inputs)
    )


def _choose_hubs(graph: OpGraph, decisions: Decisions, rng: random.Random) -> dict[str, Sharding]:
    layout = layout_of(graph, decisions)
    hubs = {}
    for name in hub_values(graph):
        needs = [layout.needed(op, i) for op in graph.ops for i, read in enumerate(op.inputs) if read == name]
        candidates = [*dict.fromkeys([layout.made(name), *needs])]
        rng.shuffle(candidates)
        hubs[name] = next(
            (
                c
                for c in candidates
                if _reaches(graph, decisions, name, [(layout.made(name), c), *((c, n) for n in needs)])
            ),
            layout.whole,
        )
    return hubs


def _reaches(graph: OpGraph, decisions: Decisions, name: str, pairs: Sequence[tuple[Sharding, Sharding]]) -> bool:
    value, sizes = graph.values[name], decisions.mesh.sizes
    divides = all(local_shape(value.meta.shape, s, sizes) is not None for pair in pairs for s in pair)
    return divides and all(redistribute_steps(s, t, sizes, value.requires_grad) is not None for s, t in pairs)


def _choose_parameters(
    graph: OpGraph, decisions: Decisions, rng: random.Random, label: str | None = None
) -> dict[str, ParameterStrategy]:
    """Random (or labelled) storage that every reader can be served from; `invariant` where there is none."""
    layout = layout_of(graph, decisions)
    chosen = {}
    for value in graph.parameters:
        options = parameter_axis_strategies(value)
        preferred = [option for option in options if label is None or option.label == label] or [options[0]]
        needs = [layout.needed(op, i) for op in graph.ops for i, read in enumerate(op.inputs) if read == value.name]
        drawn = [tuple(rng.choice(preferred) for _ in decisions.mesh.axes) for _ in range(20)]
        whole = tuple(options[0] for _ in decisions.mesh.axes)
        chosen[value.name] = next((s for s in drawn if _serves(graph, decisions, value.name, s, needs)), whole)
    return chosen


def _serves(
    graph: OpGraph, decisions: Decisions, name: str, strategy: ParameterStrategy, needs: Sequence[Sharding]
) -> bool:
    shape, sizes = graph.values[name].meta.shape, decisions.mesh.sizes
    trial = replace(decisions, parameters={name: strategy})
    entry, exposed = layout_of(graph, trial).entry(name), exposed_sharding(strategy)
    stored = [storage_sharding(strategy), optimizer_sharding(strategy)]
    if any(local_shape(shape, s, sizes) is None for s in stored):
        return False
    return _reaches(graph, decisions, name, [(entry, exposed), *((exposed, need) for need in needs)])
