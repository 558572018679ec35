"""Lift an exported program into an OpGraph: the last step of capture, which puts the others together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from autopar import torch_adapter
from autopar.capture.blocks import assign_blocks
from autopar.capture.calls import Traced, ValueRef
from autopar.capture.flatten import Flattener
from autopar.capture.normalise import normalise
from autopar.capture.trace import Outside, Trace, Tracer
from autopar.capture.user_code import choose_frame
from autopar.errors import CaptureError
from autopar.ir.graph import Arg, Op, OpGraph, Ref, Value

ORIGINS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


@dataclass(frozen=True)
class Wrapped:
    """What `lift` needs.

    Attributes:
        prefix: of the user's model inside the exported module, e.g. `model.`.
        keys: key of every tensor input, in order.
        batch_size: inputs whose dim 0 has this size are batched.
    """

    name: str
    user_file: str | None
    prefix: str
    exported: torch.export.ExportedProgram
    module: torch.nn.Module
    keys: tuple[str, ...]
    batch_size: int


@dataclass(frozen=True)
class Lifted:
    """The graph, the constants' tensors by value name, and remarks for the reader."""

    graph: OpGraph
    constants: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A placeholder that became a value."""

    outside: Outside
    fqn: str
    constant: torch.Tensor | None = None


def lift(wrapped: Wrapped) -> Lifted:
    """See the module docstring. Raises CaptureError naming op and line for what the graph cannot hold."""
    entries, placeholders = _placeholders(wrapped)
    flattener = Flattener(wrapped.user_file, wrapped.prefix)
    calls, output = flattener.flatten(wrapped.exported.graph_module, placeholders)
    loss = output[0].name
    trace = Tracer([entry.outside for entry in entries], wrapped.user_file).run(calls, loss)
    loss = trace.current[loss]
    if not trace.tensors[loss].requires_grad:
        raise CaptureError(f"{wrapped.name}: the loss does not depend on any trainable parameter")
    live = _live(trace.ops, loss)
    values = _values(trace, live, entries, wrapped.batch_size)
    shared = _shared(live, values)
    saved, extra = _saved(trace, live, values, shared)
    ops = [_op(op, wrapped.user_file, saved[op.name], extra[op.name], op.name in shared) for op in live]
    ops, scopes = normalise(ops, values, {op.name: op.scope for op in live}, loss)
    blocked, blocks = assign_blocks(ops, values, scopes)
    graph = OpGraph(wrapped.name, blocked, values, blocks, loss, wrapped.batch_size)
    constants = {e.outside.name: e.constant for e in entries if e.constant is not None}
    return Lifted(graph, constants, ())


def _placeholders(wrapped: Wrapped) -> tuple[list[_Entry], list[Any]]:
    """Values from outside, and what stands for each placeholder; tied parameters are one value."""
    exported = wrapped.exported
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    entries: list[_Entry] = []
    stands: list[Any] = []
    tied: dict[int, str] = {}
    known: set[str] = set()
    keys = iter(wrapped.keys)
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            stands.append(spec.arg.value)
            continue
        if spec.kind not in ORIGINS or not isinstance(spec.arg, TensorArgument):
            raise CaptureError(f"{wrapped.name}: cannot capture an input of kind {spec.kind.name} ({spec.arg.name})")
        origin = ORIGINS[spec.kind]
        tensor = node.meta["val"]
        constant = None
        if origin == "input":
            name, fqn = node.name, next(keys)
        else:
            name, fqn = _short_name(node.name, wrapped.prefix), str(spec.target).removeprefix(wrapped.prefix)
        if origin == "constant":
            constant = exported.constants[str(spec.target)]
        stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if origin in ("parameter", "buffer"):
            real = _attribute(wrapped.module, str(spec.target))
            name = tied.setdefault(id(real), name)
            stand_in.requires_grad_(real.requires_grad)
        stands.append(ValueRef(name))
        if name not in known:
            known.add(name)
            entries.append(_Entry(Outside(name, origin, stand_in), fqn, constant))
    return entries, stands


def _short_name(node_name: str, prefix: str) -> str:
    """`p_model_lm_head_weight` without the wrapper's part: `p_lm_head_weight`."""
    kind, _, rest = node_name.partition("_")
    return f"{kind}_{rest.removeprefix(prefix.replace('.', '_'))}"


def _attribute(module: torch.nn.Module, fqn: str) -> torch.Tensor:
    path, _, name = fqn.rpartition(".")
    found = getattr(module.get_submodule(path), name)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"{fqn} is not a tensor")
    return found


def _live(ops: list[Traced], loss: str) -> list[Traced]:
    """Ops that the loss or a buffer update needs, in order."""
    needed = {loss}
    live: list[Traced] = []
    for op in reversed(ops):
        if op.mutates or needed.intersection(op.outputs):
            needed.update(op.inputs)
            live.append(op)
    return live[::-1]


def _values(trace: Trace, live: list[Traced], entries: list[_Entry], batch_size: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for entry in entries:
        name, origin = entry.outside.name, entry.outside.origin
        meta = trace.meta(name)
        batched = origin == "input" and bool(meta.shape) and meta.shape[0] == batch_size
        needs_grad = trace.tensors[name].requires_grad
        values[name] = Value(name, meta, origin, needs_grad, name, entry.fqn, 0 if batched else None)
    for op in live:
        for name in op.outputs:
            values[name] = Value(name, trace.meta(name), "op", trace.tensors[name].requires_grad, trace.roots[name])
    return values


def _shared(live: list[Traced], values: Mapping[str, Value]) -> set[str]:
    """Names of ops that every stage can compute again for itself; see `ir.graph`."""
    mutated = {name for op in live for name in op.mutates}
    free = {n for n, v in values.items() if v.origin in ("input", "constant", "buffer") and n not in mutated}
    shared: set[str] = set()
    for op in live:
        differentiable = any(values[name].requires_grad for name in op.outputs)
        if differentiable or op.mutates or torch_adapter.is_random(op.target) or not free.issuperset(op.inputs):
            continue
        free.update(op.outputs)
        shared.add(op.name)
    return shared


def _saved(
    trace: Trace, live: list[Traced], values: Mapping[str, Value], shared: set[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Per op: values it keeps for backward, and bytes kept that are no value. Each storage counts once.

    A storage made by a shared op belongs to that op: every stage that computes it keeps it once.
    """
    saved: dict[str, list[str]] = {op.name: [] for op in live}
    extra = {op.name: op.extra_bytes for op in live}
    producer = {name: op for op in live for name in op.outputs}
    seen: set[int] = set()
    for op in live:
        for key, num_bytes in op.packed.items():
            root = trace.owner.get(key)
            if key in seen or (root in values and values[str(root)].origin in ("parameter", "buffer", "constant")):
                continue
            seen.add(key)
            own = [name for name in (*op.inputs, *op.outputs) if root is not None and trace.roots[name] == root]
            if root is not None and root in producer and producer[root].name in shared:
                saved[producer[root].name].append(root)
            elif own:
                saved[op.name].append(own[0])
            else:
                extra[op.name] += num_bytes
    return {name: tuple(names) for name, names in saved.items()}, extra


def _op(op: Traced, user_file: str | None, saved: tuple[str, ...], extra: int, is_shared: bool) -> Op:
    """The frozen op, with references by position and constants as text."""
    inputs: list[str] = []

    def encode(argument: Any) -> Arg:
        if isinstance(argument, ValueRef):
            inputs.append(argument.name)
            return Ref(len(inputs) - 1)
        if isinstance(argument, tuple):
            return tuple(encode(part) for part in argument)
        return torch_adapter.encode_constant(argument)

    args = tuple(encode(argument) for argument in op.args)
    kwargs = {key: encode(argument) for key, argument in op.kwargs.items()}
    return Op(
        name=op.name,
        target=torch_adapter.target_name(op.target),
        inputs=tuple(inputs),
        outputs=op.outputs,
        args=args,
        kwargs=kwargs,
        mutates=op.mutates,
        module_path=".".join(part.partition("@")[0] for part in op.scope.split(".")),
        source=_source(op.frames, user_file),
        flops_forward=op.flops_forward,
        flops_backward=op.flops_backward,
        saved=saved,
        saved_extra_bytes=extra,
        is_shared=is_shared,
    )


def _source(frames: tuple[tuple[str, int], ...], user_file: str | None) -> str:
    frame = choose_frame(list(frames), user_file)
    return f"{Path(frame[0]).name}:{frame[1]}" if frame else ""
