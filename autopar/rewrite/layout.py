"""Layout: in which placement every value lives, read off the decisions.

A value is `made` by its producer in one sharding and `kept` in one: the hub's where the decisions name a hub, the
parameter's entry, else as made. Consumers redistribute from the kept form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.errors import RewriteError
from autopar.ir.graph import Op, OpGraph, Value
from autopar.ir.placement import INVARIANT, REPLICATE, Sharding, format_sharding, local_shape
from autopar.ir.solution import Decisions
from autopar.ir.strategy import (
    Strategy,
    exposed_sharding,
    input_sharding,
    output_sharding,
    storage_sharding,
)
from autopar.rules.redistribute import RedistributeStep, redistribute_steps


@dataclass(frozen=True)
class Layout:
    """Answers for one graph and one set of decisions."""

    graph: OpGraph
    decisions: Decisions
    producers: Mapping[str, Op]

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        return self.decisions.mesh.sizes

    @property
    def whole(self) -> Sharding:
        """I on every axis."""
        return (INVARIANT,) * len(self.axis_sizes)

    def strategy(self, op: Op) -> Strategy:
        """The op's strategy. Raises RewriteError where the plan has none."""
        strategy = self.decisions.ops.get(op.name)
        if strategy is None:
            raise RewriteError(f"the plan has no strategy for op {op.name} ({op.target})")
        return strategy

    def made(self, name: str) -> Sharding:
        """Placement in which the value comes into being."""
        op = self.producers.get(name)
        return self.whole if op is None else output_sharding(self.strategy(op), op.outputs.index(name))

    def kept(self, name: str) -> Sharding:
        """Placement from which consumers redistribute."""
        if self.graph.values[name].origin == "parameter":
            return self.entry(name)
        return self.decisions.hubs.get(name) or self.made(name)

    def entered(self, name: str) -> Sharding:
        """Placement in which a value that no op makes comes into a segment.

        Batch inputs of inference that a single op reads come in as that op needs them, all other inputs, buffers and
        constants whole.
        """
        value = self.graph.values[name]
        if value.origin == "parameter":
            return self.entry(name)
        if value.origin == "input" and self.graph.is_inference:
            reads = [(op, i) for op in self.graph.ops for i, read in enumerate(op.inputs) if read == name]
            return self.needed(*reads[0]) if len(reads) == 1 else self.whole
        return self.whole

    def entry(self, name: str) -> Sharding:
        """A parameter's local form as autograd sees it: as stored, but R where its gradient is summed after the step.

        Raises RewriteError where the plan does not say how the parameter is stored.
        """
        strategy = self.decisions.parameters.get(name)
        if strategy is None:
            raise RewriteError(f"the plan does not place parameter {name}")
        pairs = zip(storage_sharding(strategy), exposed_sharding(strategy), strict=True)
        return tuple(REPLICATE if (s, e) == (INVARIANT, REPLICATE) else s for s, e in pairs)

    def exposed(self, name: str) -> Sharding:
        """What the ops that read a parameter see."""
        return exposed_sharding(self.decisions.parameters[name])

    def needed(self, op: Op, index: int) -> Sharding:
        """What an op requires of its input."""
        return input_sharding(self.strategy(op), index)

    def steps(self, name: str, source: Sharding, target: Sharding) -> tuple[RedistributeStep, ...]:
        """Redistribution of one value. Raises RewriteError where there is none."""
        steps = redistribute_steps(source, target, self.axis_sizes, self.graph.values[name].requires_grad)
        if steps is None:
            raise RewriteError(
                f"{name}: no way from {format_sharding(source)} to {format_sharding(target)} on mesh {self.axis_sizes}"
            )
        return steps

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the kept form on one rank. Raises RewriteError where a dim does not divide evenly."""
        value: Value = self.graph.values[name]
        shape = local_shape(value.meta.shape, self.kept(name), self.axis_sizes)
        if shape is None:
            text = format_sharding(self.kept(name))
            raise RewriteError(f"{name}: shape {value.meta.shape} does not divide as {text} over {self.axis_sizes}")
        return shape


def layout_of(graph: OpGraph, decisions: Decisions) -> Layout:
    return Layout(graph, decisions, graph.producers())
