"""Functionalise a flat list of calls and run it once on meta tensors.

The run gives, by torch's own autograd and without memory, what no table could: the shape and dtype of every value,
whether gradient flows through it, which values share storage, and what autograd saves for backward because of each
call (`capture.saved`). Calls that are alike are run once (`capture.replay`).

Functionalisation, per call:

- calls that change nothing become aliases of their input: `alias`, `lift_fresh_copy`, `to.*` to the same dtype,
  `dropout` that drops nothing, `detach` of a value without gradient;
- a value with gradient that is read under `torch.no_grad()` is read through an inserted `detach`, so that running
  the ops in sequence with gradients enabled is the whole meaning of the graph;
- in-place calls become out-of-place, and every later read of the changed tensor reads the new value. A write into a
  view writes the new part back into the whole (`slice_scatter` and the like), and other views that are read later
  are taken again (`capture.views`); where that is not possible, it is an error;
- in-place calls on buffers stay, and are listed in `mutates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.calls import Call, Traced, ValueRef, map_refs, refs_in
from autopar.capture.replay import Held, MetaRunner
from autopar.capture.user_code import capture_error, choose_frame
from autopar.capture.views import write_back
from autopar.errors import CaptureError
from autopar.ir.tensor import TensorMeta

ALIASES = ("aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift.default", "aten.lift_fresh.default")
DETACH = ("aten.detach.default", "aten.detach_.default")
DROPOUTS = ("aten.dropout.default", "aten.feature_dropout.default", "aten.dropout_.default",
            "aten.alpha_dropout.default", "aten.feature_alpha_dropout.default")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outside:
    """A value that no call makes: `tensor` is its meta stand-in."""

    name: str
    origin: str
    tensor: torch.Tensor


@dataclass
class Trace:
    """The result.

    Attributes:
        ops: functional calls in order.
        tensors, roots: layout and storage root of every value.
        current: raw name -> name of the value that it stands for at the end.
        owner: storage -> the value that owns the storage.
    """

    ops: list[Traced]
    tensors: dict[str, Held]
    roots: dict[str, str]
    current: dict[str, str]
    owner: dict[int, str]

    def meta(self, name: str) -> TensorMeta:
        tensor = self.tensors[name]
        return TensorMeta(tensor.shape, torch_adapter.dtype_name(tensor.dtype))


class Tracer:
    """Runs calls one after the other; see the module docstring."""

    def __init__(self, outside: list[Outside], user_file: str | None) -> None:
        self.user_file = user_file
        self.runner = MetaRunner()
        self.origins = {value.name: value.origin for value in outside}
        self.trace = Trace([], {}, {}, {}, {})
        self.members: dict[int, list[str]] = {}
        self.views: dict[str, Traced] = {}
        self.detached: dict[str, str] = {}
        self.last_read: dict[str, int] = {}
        self.position = 0
        for value in outside:
            self._add(value.name, self.runner.hold(value.tensor))
            self.trace.current[value.name] = value.name

    def run(self, calls: list[Call], results: Sequence[str]) -> Trace:
        """All calls; `results` are read after the last."""
        for index, call in enumerate(calls):
            for name in refs_in(call.args, call.kwargs):
                self.last_read[name] = index
        self.last_read |= dict.fromkeys(results, len(calls))
        with torch.enable_grad():
            for self.position, call in enumerate(calls):
                self._step(call)
        return self.trace

    def _step(self, call: Call) -> None:
        current = self.trace.current
        args = map_refs(lambda ref: ValueRef(current[ref.name]), call.args)
        kwargs = map_refs(lambda ref: ValueRef(current[ref.name]), call.kwargs)
        alias = self._alias_of(call, args, kwargs)
        if alias is not None:
            current[call.outputs[0]] = alias
            return
        if not call.grad_enabled:
            args, kwargs = map_refs(self._detached, args), map_refs(self._detached, kwargs)
        written = self._written(call)
        target = call.target
        mutates: tuple[str, ...] = ()
        if written and all(self.origins.get(current[name]) == "buffer" for name in written):
            mutates = tuple(dict.fromkeys(current[name] for name in written))
        elif written and call.target_name == "aten.copy_.default":
            self._check_written(call, written)
            target, args, kwargs = self._copied(call, written[0], args)
        elif written:
            self._check_written(call, written)
            target = self._functional(call, written)
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        op = Traced(call.name, target, args, kwargs, call.outputs, call.scope, call.frames, mutates)
        self._execute(op, call)
        if written and not mutates:
            self._redirect(call, written[0], self._keep_dtype(op, written[0], call))
        else:
            current.update((name, name) for name in op.outputs)

    def _alias_of(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Name of the value that the call returns unchanged, or None if it does something."""
        if not args or not isinstance(args[0], ValueRef) or len(call.outputs) != 1:
            return None
        source = self.trace.tensors[args[0].name]
        if not call.grad_enabled and source.requires_grad:
            return None
        name = call.target_name
        is_same = (
            name in ALIASES
            or (name in DETACH and not source.requires_grad)
            or (name in DROPOUTS and (args[1] == 0 or not args[2]))
            or (name.startswith("aten.to.") and self._keeps_all(call, args, kwargs, source))
        )
        return args[0].name if is_same else None

    def _keeps_all(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], source: Held) -> bool:
        """`to.*` that changes neither dtype nor memory format (devices follow the run)."""
        constants = [*args[1:], *kwargs.values()]
        if call.target_name == "aten.to.other":
            return self.trace.tensors[args[1].name].dtype == source.dtype
        dtypes = [c for c in constants if isinstance(c, torch.dtype)]
        formats = [c for c in constants if isinstance(c, torch.memory_format) and c != torch.preserve_format]
        return all(d == source.dtype for d in dtypes) and not formats

    def _detached(self, ref: ValueRef) -> ValueRef:
        """The same value without gradient; made once per value."""
        if not self.trace.tensors[ref.name].requires_grad:
            return ref
        if ref.name not in self.detached:
            name = f"{ref.name.replace(':', '_')}_detach"
            op = Traced(name, torch.ops.aten.detach.default, (ref,), {}, (name,), "", ())
            self.trace.ops.append(op)
            self._add(name, self.trace.tensors[ref.name].detach())
            self.detached[ref.name] = name
        return ValueRef(self.detached[ref.name])

    def _written(self, call: Call) -> tuple[str, ...]:
        """Raw names of the tensors that the call changes."""
        if call.target_name == "aten.batch_norm.default":
            return refs_in(call.args[3:5]) if call.args[5] else ()
        found: list[str] = []
        for where in torch_adapter.written_arguments(call.target):
            argument = call.kwargs.get(where) if isinstance(where, str) else _argument(call, where)
            found.extend(refs_in(argument))
        return tuple(found)

    def _functional(self, call: Call, written: tuple[str, ...]) -> Any:
        target = torch_adapter.functional_overload(call.target)
        if target is None or len(written) != 1 or call.args[:1] != (ValueRef(written[0]),):
            raise self._error("this in-place operation has no out-of-place form here", call)
        return target

    def _check_written(self, call: Call, written: tuple[str, ...]) -> None:
        """Only activations and inputs may change; a part of a buffer would lose its update."""
        origins = {self.origins.get(self.trace.roots[self.trace.current[name]], "op") for name in written}
        for origin in sorted(origins & {"parameter", "buffer"}):
            raise self._error(f"a {origin}, or a part of it, is changed in place in the forward", call)
        if not call.grad_enabled and any(self.trace.tensors[self.trace.current[n]].requires_grad for n in written):
            raise self._error("an activation with gradient is changed in place under no_grad", call)

    def _redirect(self, call: Call, written: str, new: str) -> None:
        """Later reads of the changed storage, under any name and through any view, see the value `new` in it."""
        current = self.trace.current
        base = current[written]
        key = self.trace.tensors[base].storage
        renewed = {base: new}
        for name in self._written_chain(base, renewed, call):
            renewed.setdefault(name, name)
        for name, value in sorted(current.items()):
            if value in renewed:
                current[name] = renewed[value]
            elif value in self.members[key] and self.last_read.get(name, -1) > self.position:
                current[name] = self._view_again(value, renewed, call)
        current[call.outputs[0]] = new

    def _written_chain(self, base: str, renewed: dict[str, str], call: Call) -> list[str]:
        """Write the new value of a view back into what it is a view of, up to the storage's owner."""
        child, chain = base, []
        while child in self.views:
            view = self.views[child]
            parent = view.args[0].name
            written = write_back(view, ValueRef(renewed[child]), self.trace.tensors[parent].shape)
            if written is None:
                raise self._error(f"changed in place through a view ({view.name}) that cannot be written back", call)
            renewed[parent] = self._insert(f"{call.name}_into_{parent.replace(':', '_')}", *written, call)
            chain.append(parent)
            child = parent
        return chain

    def _view_again(self, value: str, renewed: dict[str, str], call: Call) -> str:
        """The same view as `value`, of the changed tensor."""
        if value not in renewed:
            view = self.views.get(value)
            if view is None:
                raise self._error("changed in place, and another view of the same tensor is read later", call)
            parent = self._view_again(view.args[0].name, renewed, call)
            name = f"{value.replace(':', '_')}_after_{call.name}"
            renewed[value] = self._insert(name, view.target, (ValueRef(parent), *view.args[1:]), view.kwargs, call)
        return renewed[value]

    def _insert(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> str:
        """Add an op of ours beside `call`."""
        self._execute(Traced(name, target, args, dict(kwargs), (name,), call.scope, call.frames), call)
        return name

    def _execute(self, op: Traced, call: Call) -> None:
        """Run on meta tensors, record saved tensors, metas, FLOPs; append to the trace."""
        tensors = self.trace.tensors
        try:
            outcome = self.runner.run(op.target, op.args, op.kwargs, tensors)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise self._error(f"cannot run on meta tensors: {str(error).splitlines()[0]}", call) from None
        op.packed, op.extra_bytes = outcome.packed, outcome.extra_bytes
        op.flops_forward, op.flops_backward = outcome.flops
        self.trace.ops.append(op)
        for name, tensor in zip(op.outputs, outcome.results, strict=True):
            self._add(name, tensor)
        storages = {held.storage for held in outcome.results}
        is_one = len(outcome.results) == 1 and op.args and isinstance(op.args[0], ValueRef) and not op.mutates
        if is_one and tensors[op.args[0].name].storage in storages:
            self.views[op.outputs[0]] = op
        _state_dtype(op, outcome.results)

    def _keep_dtype(self, op: Traced, written: str, call: Call) -> str:
        """Name of the op's result in the dtype of what the in-place call changed; a cast is added if they differ."""
        tensors, (output,) = self.trace.tensors, op.outputs
        wanted = tensors[self.trace.current[written]].dtype
        if tensors[output].dtype == wanted:
            return output
        return self._insert(f"{op.name}_cast", torch.ops.aten.to.dtype, (ValueRef(output), wanted), {}, call)

    def _copied(self, call: Call, written: str, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """`copy_(x, y)` as a copy of `y` in the shape of `x` (the functional `copy` has no derivative)."""
        shape = self.trace.tensors[self.trace.current[written]].shape
        source = args[1]
        if self.trace.tensors[source.name].shape != shape:
            source = ValueRef(
                self._insert(f"{call.name}_expand", torch.ops.aten.expand.default, (source, shape), {}, call)
            )
        return torch.ops.aten.clone.default, (source,), {}

    def _add(self, name: str, tensor: Held) -> None:
        key = tensor.storage
        self.trace.tensors[name] = tensor
        self.trace.roots[name] = self.trace.owner.setdefault(key, name)
        self.members.setdefault(key, []).append(name)

    def _error(self, problem: str, call: Call) -> CaptureError:
        return capture_error(problem, call.target_name, choose_frame(list(call.frames), self.user_file))


def _argument(call: Call, index: int) -> Any:
    if index < len(call.args):
        return call.args[index]
    return call.kwargs.get(torch_adapter.argument_names(call.target)[index])


def _state_dtype(op: Traced, results: tuple[Held, ...]) -> None:
    """Creation ops without a dtype follow torch's default dtype: name it, so that the graph means one thing."""
    if not op.inputs and results and "dtype" in torch_adapter.argument_names(op.target):
        op.kwargs.setdefault("dtype", results[0].dtype)
