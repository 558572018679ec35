"""Ops on merged tokens run on the unmerged ones, so that a split of the sequence passes through.

Model code often flattens [batch, sequence, features] to [tokens, features] before a matrix product or a loss. A slice
of the sequence is then no slice of the tokens. Two patterns are undone:

* `view(addmm(bias, view(x), weight))` becomes `linear(x, t(weight), bias)`, which is the same kernel call;
* `cross_entropy_loss(view(logits), view(target))` becomes the region op `autopar.token_loss` of the unmerged tensors:
  the mean over tokens does not depend on their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from autopar.capture.live import live_calls
from autopar.ir.graph import Arg, Op, Ref, Value
from autopar.ir.tensor import TensorMeta

VIEWS = ("aten.view.default", "aten.reshape.default", "aten.flatten.using_ints", "aten._unsafe_view.default")
TOKEN_LOSS = "autopar.token_loss"
MIN_DIMS = 3


@dataclass
class Unmerger:
    """Rewrites a list of ops once. `scopes` gains the names of new ops; `values` those of new values."""

    ops: list[Op]
    values: dict[str, Value]
    scopes: dict[str, str]
    producers: dict[str, Op] = field(default_factory=dict)
    readers: dict[str, list[Op]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def run(self) -> list[Op]:
        """Views that have lost their readers stay, dead."""
        for op in self.ops:
            self.producers |= dict.fromkeys(op.outputs, op)
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)
        found = [new for op in self.ops for new in self._unmerged(op)]
        if not self.renamed:
            return found
        for name, value in self.values.items():
            self.values[name] = replace(value, root=self.renamed.get(value.root, value.root))
        return [self._rename(op) for op in found]

    def _unmerged(self, op: Op) -> list[Op]:
        if op.target == "aten.addmm.default":
            return self._linear(op)
        if op.target == "aten.cross_entropy_loss.default":
            return [self._token_loss(op)]
        return [op]

    def _rename(self, op: Op) -> Op:
        """Readers of a view that split the tokens again read the unmerged result itself."""
        if op.outputs and op.outputs[0] in self.renamed:
            return op
        return replace(
            op,
            inputs=tuple(self.renamed.get(name, name) for name in op.inputs),
            saved=tuple(self.renamed.get(name, name) for name in op.saved),
        )

    def _merged(self, name: str) -> Op | None:
        """The view that merges all dims but the last of the tensor it reads, if it made `name`."""
        op = self.producers.get(name)
        if op is None or op.target not in VIEWS:
            return None
        source, result = (self.values[n].meta for n in (op.inputs[0], name))
        is_merge = len(source.shape) >= MIN_DIMS and len(result.shape) == 2 and source.shape[-1] == result.shape[-1]
        return op if is_merge else None

    def _linear(self, op: Op) -> list[Op]:
        """linear(x, t(weight), bias) of the unmerged x, if the result is unmerged alike."""
        is_plain = (
            op.args == (Ref(0), Ref(1), Ref(2)) and not op.kwargs and len(self.values[op.inputs[0]].meta.shape) == 1
        )
        merge = self._merged(op.inputs[1]) if is_plain else None
        readers = self.readers.get(op.outputs[0], [])
        if merge is None or len(readers) != 1 or readers[0].target not in VIEWS:
            return [op]
        bias, weight = op.inputs[0], op.inputs[2]
        source, result = merge.inputs[0], self.values[op.outputs[0]]
        shape = (*self.values[source].meta.shape[:-1], result.meta.shape[-1])
        split = readers[0].outputs[0]
        if self.values[split].meta.shape != shape:
            return [op]
        turned = f"{op.name}_t"
        weight_value = self.values[weight]
        turned_meta = TensorMeta(weight_value.meta.shape[::-1], weight_value.meta.dtype)
        self.values[turned] = Value(turned, turned_meta, "op", weight_value.requires_grad, weight_value.root)
        self.values[op.name] = replace(result, meta=result.meta.with_shape(shape))
        self.renamed[split] = op.name
        self.scopes[turned] = self.scopes[op.name]
        transposed = Op(
            turned, "aten.t.default", (weight,), (turned,), (Ref(0),), module_path=op.module_path, source=op.source
        )
        saved = tuple(source if name == op.inputs[1] else turned if name == weight else name for name in op.saved)
        product = replace(op, target="aten.linear.default", inputs=(source, turned, bias), saved=saved)
        return [transposed, product]

    def _token_loss(self, op: Op) -> Op:
        merge = self._merged(op.inputs[0])
        flat = self.producers.get(op.inputs[1])
        if merge is None or flat is None or flat.target not in VIEWS or len(op.inputs) != 2:
            return op
        logits, target = merge.inputs[0], flat.inputs[0]
        if self.values[target].meta.shape != self.values[logits].meta.shape[:-1]:
            return op
        names = {op.inputs[0]: logits, op.inputs[1]: target}
        args: tuple[Arg, ...] = op.args
        return replace(
            op,
            target=TOKEN_LOSS,
            inputs=(logits, target),
            args=args,
            members=(merge, flat, op),
            saved=tuple(names.get(name, name) for name in op.saved),
        )


def remove_dead(ops: list[Op], values: dict[str, Value], results: Iterable[str]) -> list[Op]:
    """Ops that the results or a buffer update need; what the others make leaves `values` unless members make them."""
    live = live_calls(ops, results)
    kept = {name for op in live for call in (op, *op.members) for name in (*call.inputs, *call.outputs)}
    for name in [n for n, value in values.items() if value.origin == "op" and n not in kept]:
        del values[name]
    return live


def unmerge(ops: list[Op], values: dict[str, Value], scopes: Mapping[str, str]) -> tuple[list[Op], dict[str, str]]:
    """See the module docstring; also the scopes, with those of new ops."""
    grown = dict(scopes)
    return Unmerger(ops, values, grown).run(), grown
