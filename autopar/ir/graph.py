"""OpGraph: the captured training-forward graph as frozen values, without torch objects.

`Value`s are tensors; each has one producer: an `Op`, or the outside (parameter, buffer, constant, batch input).
`Op`s stand in execution order and are grouped into contiguous `Block`s, the units of pipeline cuts and of
recompute. Blocks of the same `class_id` are structurally identical (same ops, shapes, constants and wiring).
Ops that depend on batch inputs and constants alone and carry no gradient are `is_shared`: every stage that needs
them computes them again, so they never cross a stage cut and belong to no block (`block == -1`).

The graph ends in `loss`, a scalar. Shapes are those of one whole global batch.

An inference graph has `outputs` in place of a loss, and parameters without gradient. Its activations still say whether
they depend on parameters (`requires_grad`), and `Op.saved` lists what lasts until the step is over: batch inputs
(such as a cache) and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from autopar.ir.tensor import TensorMeta


@dataclass(frozen=True, slots=True)
class Ref:
    """In `Op.args`: stands for the `index`-th entry of `Op.inputs`."""

    index: int


Arg: TypeAlias = "bool | int | float | str | Ref | tuple[Arg, ...] | None"
"""A constant or reference in a call. dtypes, layouts, devices and memory formats are strings: `dtype:float32`."""

ORIGINS = ("op", "parameter", "buffer", "constant", "input")


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor.

    Attributes:
        name: unique in the graph. Output i of a multi-output op `split` is `split:i`.
        origin: one of ORIGINS.
        requires_grad: gradient flows through it.
        root: name of the value that owns the storage (itself unless this is a view).
        fqn: module path of a parameter, buffer or constant, key or position of a batch input; else "".
        batch_dim: for origin "input": dim that counts samples, or None; else None.
    """

    name: str
    meta: TensorMeta
    origin: str
    requires_grad: bool
    root: str
    fqn: str = ""
    batch_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """One call.

    Attributes:
        name: unique, stable between captures of the same code (the fx node name).
        target: `aten.linear.default`; `autopar.moe_experts`, `autopar.token_loss`: a region that must share one
            strategy.
        inputs: names of the tensor values read, in order of appearance; one entry per appearance.
        outputs: names of the values produced.
        args, kwargs: the whole call, with `Ref`s into `inputs`.
        members: for a region op: the calls it stands for, in execution order; else (). Values between them are in
            `OpGraph.values` but are read by no other op.
        mutates: buffers among `inputs` that the call changes in place (never parameters or activations).
        module_path: e.g. `model.layers.3.mlp`.
        source: `file.py:12` of the user's code, or "".
        flops_forward, flops_backward: multiply and add count as two; backward covers every gradient needed.
        saved: input or output values that autograd keeps because of this op; each storage root is listed once in
            the whole graph, parameters never.
        saved_extra_bytes: bytes kept that are no graph value (masks, statistics).
        block: index into `OpGraph.blocks`, or -1 if `is_shared`.
        is_shared: see module docstring.
    """

    name: str
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg] = field(default_factory=dict)
    members: tuple[Op, ...] = ()
    mutates: tuple[str, ...] = ()
    module_path: str = ""
    source: str = ""
    flops_forward: int = 0
    flops_backward: int = 0
    saved: tuple[str, ...] = ()
    saved_extra_bytes: int = 0
    block: int = -1
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous run of non-shared ops `ops[start:stop]` of `OpGraph.ops` (shared ops in between are skipped)."""

    index: int
    name: str
    start: int
    stop: int
    class_id: str


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that an inference graph returns.

    Attributes:
        value: its name in the graph.
        key: its place in what the model returns, e.g. `logits` or `1.0.1`.
        stays: it is left split as the plan has it; else it is whole, but for samples.
        batch_dim: dim that counts samples, or None.
    """

    value: str
    key: str
    stays: bool
    batch_dim: int | None


@dataclass(frozen=True)
class OpGraph:
    """The whole program of one step's forward and loss; see the module docstring for the invariants.

    Attributes:
        loss: name of the loss; "" in an inference graph.
        outputs: of an inference graph, in the order in which the model returns them; else ().
    """

    name: str
    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    blocks: tuple[Block, ...]
    loss: str
    batch_size: int
    optimizer: str = "adamw"
    outputs: tuple[Output, ...] = ()

    @property
    def is_inference(self) -> bool:
        """It has outputs in place of a loss."""
        return bool(self.outputs)

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the values that it is run for."""
        return tuple(output.value for output in self.outputs) or (self.loss,)

    def op(self, name: str) -> Op:
        return next(op for op in self.ops if op.name == name)

    def outside(self, origin: str) -> tuple[Value, ...]:
        """Values of one non-op origin, in graph order."""
        return tuple(v for v in self.values.values() if v.origin == origin)

    @property
    def parameters(self) -> tuple[Value, ...]:
        return self.outside("parameter")

    def consumers(self) -> dict[str, tuple[Op, ...]]:
        """Ops that read each value, in execution order, each op once."""
        found: dict[str, list[Op]] = {name: [] for name in self.values}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    def producers(self) -> dict[str, Op]:
        """Op that makes each value of origin "op"."""
        return {name: op for op in self.ops for name in op.outputs}
