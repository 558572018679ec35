"""Segment: one block of a stage as an `fx.GraphModule` of local calls and explicit redistributions.

A segment takes graph values in their kept placement (parameters in their entry form) and returns values in theirs.
Every node carries in `meta` what it stands for: `value` and `sharding`, and for calls `op`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.ir.graph import Op, Output
from autopar.ir.placement import Sharding, format_sharding
from autopar.program.collectives import STEP_FUNCTIONS, AxisGroup
from autopar.program.delayed import DELAYED, DelayedWeights
from autopar.program.gathered import GatherScope, GatherSteps, gather_parameter
from autopar.program.local_ops import LOCAL_OPERATIONS, NEEDS_MEMBERS, NEEDS_STREAM
from autopar.program.recompute import Keeper, keep_output, run_again
from autopar.program.stage import LOSS_OUTPUT, Segment, left_name
from autopar.program.stream import StreamState, buffer_for_update
from autopar.rewrite.layout import Layout
from autopar.rewrite.region import experts_module, member_call, result_nodes
from autopar.rewrite.torch_args import fill, resolve_target
from autopar.rules.local import LocalCall
from autopar.rules.local_call import local_call
from autopar.rules.outputs import left_as
from autopar.rules.recompute import BlockRecompute, with_cores_together
from autopar.rules.redistribute import RedistributeStep


@dataclass(frozen=True)
class Attributes:
    """Objects that a program's nodes refer to by `get_attr`: axis groups by name, and one of each other class."""

    axes: tuple[AxisGroup, ...]
    stream: StreamState
    scope: GatherScope
    keeper: Keeper
    delayed: DelayedWeights
    device: str

    def by_name(self) -> dict[str, Any]:
        others = {"stream": self.stream, "scope": self.scope, "keeper": self.keeper, "delayed": self.delayed}
        return {f"axis_{a.name}": a for a in self.axes} | others


@dataclass
class SegmentBuilder:
    """Builds one segment; used once. Of `delays` are the products whose weight gradients wait."""

    layout: Layout
    attributes: Attributes
    recompute: BlockRecompute = field(default_factory=BlockRecompute)
    delays: frozenset[str] = frozenset()
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[str, fx.Node] = field(default_factory=dict)
    held: dict[tuple[str, Sharding], fx.Node] = field(default_factory=dict)
    objects: dict[str, fx.Node] = field(default_factory=dict)
    called: dict[str, Any] = field(default_factory=dict)
    gathered: list[tuple[str, GatherSteps]] = field(default_factory=list)

    def build(
        self, name: str, ops: Sequence[Op], outputs: Sequence[str], *, with_loss: bool, leaving: Sequence[Output] = ()
    ) -> Segment:
        """Add the ops in order, then the outputs, and those of the graph that are `leaving` it.

        Raises:
            RewriteError: if the decisions do not fit the graph.
        """
        self._add_inputs(ops, outputs, with_loss=with_loss)
        cores = {core[0].name for core in self.recompute.cores}
        for group in with_cores_together(ops, self.recompute.cores):
            if group[0].name in cores:
                self._add_core(group)
            else:
                self._add_op(group[0])
        results = [self._kept(value) for value in outputs]
        names = tuple(outputs)
        if with_loss:
            results.append(self.fetch(self.layout.graph.loss, self.layout.whole))
            names = (*names, LOSS_OUTPUT)
        for output in leaving:
            results.append(self.fetch(output.value, left_as(self.layout.kept(output.value), output)))
            names = (*names, left_name(output.value))
        self.graph.output(tuple(results))
        self.graph.lint()
        return Segment(name, self._module(name), tuple(self.inputs), names, tuple(self.gathered), self.recompute.whole)

    def _module(self, name: str) -> fx.GraphModule:
        return fx.GraphModule(self.attributes.by_name() | self.called, self.graph, class_name=_identifier(name))

    def _add_inputs(self, ops: Sequence[Op], outputs: Sequence[str], *, with_loss: bool) -> None:
        made = {name for op in ops for name in op.outputs}
        read = {name for op in ops for name in op.inputs} | set(outputs)
        if with_loss:
            read.add(self.layout.graph.loss)
        for name in self.layout.graph.values:
            if name in read and name not in made:
                node = self.graph.placeholder(_identifier(name))
                self._remember(node, name, self._entered(name))
                self.inputs[name] = node

    def _entered(self, name: str) -> Sharding:
        """Outside values come in whole; only then are they brought into the form in which they are kept."""
        made = self.layout.graph.values[name].origin == "op"
        return self.layout.kept(name) if made else self.layout.entered(name)

    def _remember(self, node: fx.Node, value: str, sharding: Sharding) -> None:
        node.meta["value"], node.meta["sharding"] = value, sharding
        self.held[value, sharding] = node

    def _object(self, name: str) -> fx.Node:
        if name not in self.objects:
            self.objects[name] = self.graph.create_node("get_attr", name)
        return self.objects[name]

    def _kept(self, name: str) -> fx.Node:
        """The value in its kept form; outside values are brought there once."""
        kept = self.layout.kept(name)
        if (name, kept) not in self.held:
            self._redistribute(name, self._entered(name), kept)
        return self.held[name, kept]

    def fetch(self, name: str, target: Sharding) -> fx.Node:
        """The value in the form that a consumer needs; equal redistributions are shared."""
        if (name, target) in self.held:
            return self.held[name, target]
        self._kept(name)
        source = self.layout.kept(name)
        if self.layout.graph.values[name].origin == "parameter":
            self._expose(name)
            source = self.layout.exposed(name)
        return self._redistribute(name, source, target)

    def _expose(self, name: str) -> None:
        """Bring a parameter from its entry form to its exposed form, gathering where it is stored sharded."""
        entry, exposed = self.layout.entry(name), self.layout.exposed(name)
        steps = self.layout.steps(name, entry, exposed)
        if (name, exposed) in self.held:
            return
        node = self.held[name, entry]
        if steps:
            arguments = tuple((s.kinds, self._object(self._axis(s)), _dims(s)) for s in steps)
            node = self.graph.call_function(gather_parameter, (node, arguments, self._object("scope")))
            axes = self.attributes.axes
            self.gathered.append((name, tuple((s.kinds, axes[s.axis], _dims(s)) for s in steps)))
        self._remember(node, name, exposed)

    def _axis(self, step: RedistributeStep) -> str:
        return f"axis_{self.attributes.axes[step.axis].name}"

    def _redistribute(self, name: str, source: Sharding, target: Sharding) -> fx.Node:
        """Add the steps from one held form to another; forms on the way are held too."""
        node, state = self.held[name, source], source
        for step in self.layout.steps(name, source, target):
            state = (*state[: step.axis], step.target, *state[step.axis + 1 :])
            if (name, state) in self.held:
                node = self.held[name, state]
                continue
            axis = self._object(self._axis(step))
            node = self.graph.call_function(STEP_FUNCTIONS[step.kinds], (node, axis, *_dims(step)))
            self._remember(node, name, state)
        if (name, target) not in self.held:
            self.held[name, target] = node
        return self.held[name, target]

    def _add_op(self, op: Op) -> None:
        strategy = self.layout.strategy(op)
        values = self.layout.graph.values
        call = local_call(op, strategy, self.layout.axis_sizes, values)
        inputs = [self.fetch(name, self.layout.needed(op, i)) for i, name in enumerate(op.inputs)]
        for i, name in enumerate(op.inputs):
            if name in op.mutates:
                inputs[i] = self.graph.call_function(buffer_for_update, (inputs[i], self._object("stream")))
        run = self._run_members if op.members and call.target not in LOCAL_OPERATIONS else self._run_one
        made = run(op, call, inputs)
        for name in op.outputs:
            node = made[name] if call.scale == 1.0 else self.graph.call_function(torch.mul, (made[name], call.scale))
            self._remember(node, name, self.layout.made(name))
            self._redistribute(name, self.layout.made(name), self.layout.kept(name))

    def _add_core(self, core: Sequence[Op]) -> None:
        """A part that runs again in backward: a module of its own, from operands in the form in which it needs them."""
        inner = SegmentBuilder(self.layout, self.attributes, delays=self.delays)
        made = {name for op in core for name in op.outputs}
        needs = {(n, self.layout.needed(op, i)): None for op in core for i, n in enumerate(op.inputs) if n not in made}
        for index, (name, form) in enumerate(needs):
            inner._remember(inner.graph.placeholder(f"{_identifier(name)}_{index}"), name, form)
        for op in core:
            inner._add_op(op)
        inner.graph.output(tuple(inner._kept(name) for op in core for name in op.outputs))
        title = f"core_{_identifier(core[0].name)}"
        self.called[title] = inner._module(title)
        given = [self.fetch(name, form) for name, form in needs]
        objects = (self._object(title), self._object("stream"), self._object("keeper"))
        node = self.graph.call_function(run_again, (*objects, *given))
        for index, name in enumerate(name for op in core for name in op.outputs):
            item = self.graph.call_function(operator.getitem, (node, index))
            self._remember(item, name, self.layout.kept(name))

    def _run_one(self, op: Op, call: LocalCall, inputs: Sequence[fx.Node]) -> dict[str, fx.Node]:
        return result_nodes(self.graph, op, self._call(op, call, inputs))

    def _call(self, op: Op, call: LocalCall, inputs: Sequence[fx.Node]) -> fx.Node:
        device = self.attributes.device
        args = tuple(fill(arg, tuple(inputs), device) for arg in call.args)
        kwargs = {key: fill(arg, tuple(inputs), device) for key, arg in call.kwargs.items()}
        target: Callable[..., Any]
        if call.target in LOCAL_OPERATIONS:
            target = LOCAL_OPERATIONS[call.target]
            kwargs |= self._split_aware_kwargs(call)
            if call.target in NEEDS_MEMBERS:
                kwargs["core"] = self._experts(op, call)
        else:
            target = resolve_target(call.target, self.attributes.device)
            if op.name in self.delays and call.target in DELAYED:
                target, args = DELAYED[call.target], (self._object("delayed"), *args)
        if op.name in self.recompute.kept and call.target not in LOCAL_OPERATIONS:
            title = f"call_{_identifier(op.name)}"
            self.called[title] = target
            target, args = keep_output, (self._object("keeper"), self._object(title), *args)
        node = self.graph.create_node("call_function", target, args, kwargs, name=_identifier(op.name))
        node.meta["op"] = op.name
        return node

    def _split_aware_kwargs(self, call: LocalCall) -> dict[str, Any]:
        """`*_axes` as axis groups, and the stream where random numbers are drawn."""
        axes = tuple(self._object(f"axis_{axis.name}") for axis in self.attributes.axes)
        found: dict[str, Any] = {
            key: tuple(axes[i] for i in indices if isinstance(i, int))
            for key, indices in call.kwargs.items()
            if key.endswith("_axes") and isinstance(indices, tuple)
        }
        if call.target in NEEDS_STREAM:
            found |= {"axes": axes, "stream": self._object("stream")}
        return found

    def _experts(self, op: Op, call: LocalCall) -> fx.Node:
        """The region's calls over the experts of one rank, as a module of the segment."""
        axes, total = call.kwargs["expert_axes"], call.kwargs["num_experts"]
        assert isinstance(axes, tuple)
        assert isinstance(total, int)
        ranks = math.prod(self.layout.axis_sizes[i] for i in axes if isinstance(i, int))
        name = f"experts_{_identifier(op.name)}"
        self.called[name] = experts_module(op, total // ranks, self.attributes.device)
        return self._object(name)

    def _run_members(self, region: Op, call: LocalCall, inputs: Sequence[fx.Node]) -> dict[str, fx.Node]:
        """The region's own calls on this rank's tokens."""
        nodes: dict[str, fx.Node] = dict(zip(region.inputs, inputs, strict=True))
        for member in region.members:
            local = member_call(member, call.kwargs)
            node = self._call(member, local, [nodes[name] for name in member.inputs])
            nodes |= result_nodes(self.graph, member, node)
        return nodes


def _dims(step: RedistributeStep) -> tuple[int, ...]:
    """Dims of the splits of one step, source first."""
    return tuple(p.dim for p in (step.source, step.target) if p.is_shard)


def _identifier(name: str) -> str:
    """A Python name near `name`."""
    text = re.sub(r"\W", "_", name)
    return text if text[:1].isalpha() or text[:1] == "_" else f"_{text}"


def describe(node: fx.Node, strategies: Mapping[str, str]) -> str:
    """What a node stands for, for the reader: `x: S0,I` and the op's strategy."""
    sharding = node.meta.get("sharding")
    parts = [f"{node.meta['value']}: {format_sharding(sharding)}"] if sharding is not None else []
    if "op" in node.meta:
        parts.append(strategies.get(node.meta["op"], ""))
    return "  ".join(part for part in parts if part)
