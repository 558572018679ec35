"""Lift an exported program into an OpGraph: the last step of capture, which puts the others together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.blocks import assign_blocks
from autopar.capture.calls import Frames, Traced, ValueRef
from autopar.capture.expand import Owned, expand, name_calls
from autopar.capture.flatten import Flattener
from autopar.capture.inference import as_inference, held_by_op, kept_results
from autopar.capture.live import live_calls
from autopar.capture.normalise import normalise
from autopar.capture.outside import Entry, Wrapped, outside_values
from autopar.capture.trace import Trace, Tracer
from autopar.capture.user_code import choose_frame
from autopar.errors import CaptureError
from autopar.ir.graph import Arg, Op, OpGraph, Ref, Value


@dataclass(frozen=True)
class Lifted:
    """The graph, the constants' tensors by value name, and remarks for the reader."""

    graph: OpGraph
    constants: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def lift(wrapped: Wrapped) -> Lifted:
    """See the module docstring.

    Raises:
        CaptureError: names op and line for what the graph cannot hold.
        RefusedError: the trace is a shortened one, and the layers are not alike.
    """
    entries, placeholders = outside_values(wrapped)
    flattener = Flattener(wrapped.user_file, wrapped.prefix)
    calls, output = flattener.flatten(wrapped.exported.graph_module, placeholders)
    results = tuple(ref.name for ref in (output if wrapped.returned else output[:1]))
    if wrapped.sites is not None:
        calls, results = expand(calls, results, wrapped.sites, _owned(entries))
    calls, results = name_calls(calls, results, (entry.outside.name for entry in entries))
    trace = Tracer([entry.outside for entry in entries], wrapped.user_file).run(calls, results)
    results = tuple(trace.current[name] for name in results)
    if not wrapped.returned and not trace.tensors[results[0]].requires_grad:
        raise CaptureError(f"{wrapped.name}: the loss does not depend on any trainable parameter")
    live = live_calls(trace.ops, results)
    values = _values(trace, live, entries, wrapped.batch_size)
    shared = _shared(live, values, with_data=not wrapped.returned)
    sources = _sources(live, wrapped.user_file)
    outputs, notes = kept_results(wrapped.name, dict(zip(wrapped.returned, results, strict=False)), live, shared)
    if wrapped.returned:
        saved, extra = held_by_op(live, values, outputs.values()), dict.fromkeys([op.name for op in live], 0)
    else:
        saved, extra = _saved(trace, live, values, shared)
    ops = [_op(op, sources[op.frames], saved[op.name], extra[op.name], op.name in shared) for op in live]
    ops, scopes = normalise(ops, values, {op.name: op.scope for op in live}, results)
    blocked, blocks = assign_blocks(ops, values, scopes)
    loss = "" if wrapped.returned else results[0]
    graph = OpGraph(wrapped.name, blocked, values, blocks, loss, wrapped.batch_size)
    constants = {e.outside.name: e.constant for e in entries if e.constant is not None}
    return Lifted(as_inference(graph, outputs) if wrapped.returned else graph, constants, notes)


def _owned(entries: list[Entry]) -> Owned:
    """Parameters and buffers."""
    held = (entry for entry in entries if entry.outside.origin in ("parameter", "buffer"))
    return Owned({entry.outside.name: entry.fqn for entry in held})


def _values(trace: Trace, live: list[Traced], entries: list[Entry], batch_size: int) -> dict[str, Value]:
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


def _shared(live: list[Traced], values: Mapping[str, Value], *, with_data: bool) -> set[str]:
    """Names of ops that every stage can compute again for itself; see `ir.graph`.

    `with_data` False: batch inputs that are no indices, such as a cache, are worked on where they lie alone.
    """
    mutated = {name for op in live for name in op.mutates}
    free = {n for n, v in values.items() if v.origin in ("input", "constant", "buffer") and n not in mutated}
    if not with_data:
        free -= {n for n, v in values.items() if v.origin == "input" and v.meta.is_floating}
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


def _op(op: Traced, source: str, saved: tuple[str, ...], extra: int, is_shared: bool) -> Op:
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
        source=source,
        flops_forward=op.flops_forward,
        flops_backward=op.flops_backward,
        saved=saved,
        saved_extra_bytes=extra,
        is_shared=is_shared,
    )


def _sources(ops: list[Traced], user_file: str | None) -> dict[Frames, str]:
    """`Op.source` by the frames of the call."""
    chosen = {frames: choose_frame(frames, user_file) for frames in {op.frames for op in ops}}
    return {frames: f"{Path(frame[0]).name}:{frame[1]}" if frame else "" for frames, frame in chosen.items()}
