"""Block classes: blocks with one `class_id` have the same ops in the same order, with the same shapes, constants and
wiring, so that op i of one is op i of the other and one price and one decision serve for all.

Names of values, parameters and modules do not count. A value from outside a block is described by its origin, meta
and gradient, where an activation comes from (`previous` block, `far`, or `wide`: read by many blocks, like an encoder's
output), and whether several ops read it. A value that later blocks read is described likewise, since a value with
several readers is priced differently from one with a single reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from autopar.ir.graph import Arg, Op, Ref, Value

WIDE_READERS = 3
"""An activation read by this many other blocks is `wide`."""


def encode_argument(argument: Arg) -> Any:
    """An argument as JSON; references, tuples and text stay apart."""
    if isinstance(argument, Ref):
        return {"ref": argument.index}
    if isinstance(argument, tuple):
        return [encode_argument(part) for part in argument]
    return {"float": repr(argument)} if isinstance(argument, float) else argument


def encode_call(op: Op) -> Any:
    """Target and arguments, members included, without names."""
    return [
        op.target,
        encode_argument(op.args),
        {key: encode_argument(arg) for key, arg in sorted(op.kwargs.items())},
        [encode_call(member) for member in op.members],
    ]


def encode_value(value: Value) -> list[Any]:
    return [list(value.meta.shape), value.meta.dtype, value.requires_grad]


def digest(data: object) -> str:
    """SHA-256 hex of the canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Describer:
    """Knows who makes and who reads each value."""

    def __init__(self, blocks: Sequence[Sequence[Op]], values: Mapping[str, Value], shared: Sequence[Op]) -> None:
        self.values = values
        self.made_in = {name: b for b, ops in enumerate(blocks) for op in ops for name in op.outputs}
        self.shared = {name for op in shared for name in op.outputs}
        self.num_reads: dict[str, int] = {}
        self.readers: dict[str, set[int]] = {}
        for b, ops in enumerate(blocks):
            for name in (name for op in ops for name in op.inputs):
                self.num_reads[name] = self.num_reads.get(name, 0) + 1
                self.readers.setdefault(name, set()).add(b)

    def outside(self, name: str, block: int) -> list[Any]:
        value = self.values[name]
        producer = self.made_in.get(name)
        if producer is None:
            where = "shared" if name in self.shared else value.origin
        elif len(self.readers[name] - {producer}) >= WIDE_READERS:
            where = "wide"
        else:
            where = "previous" if producer == block - 1 else "far"
        reads = min(2, self.num_reads[name]) if where not in ("shared", "input", "constant", "buffer") else 0
        is_view = value.root != name
        return [where, encode_value(value), value.batch_dim, reads, is_view]

    def result(self, name: str, block: int) -> list[Any]:
        readers = self.readers.get(name, set()) - {block}
        later = "none" if not readers else "wide" if len(readers) >= WIDE_READERS else "later"
        return [encode_value(self.values[name]), later, min(2, self.num_reads.get(name, 0))]


def class_ids(blocks: Sequence[Sequence[Op]], values: Mapping[str, Value], shared: Sequence[Op]) -> list[str]:
    """One short hash per block; `shared` are the ops of no block."""
    describer = _Describer(blocks, values, shared)
    return [digest(_describe(ops, index, describer))[:16] for index, ops in enumerate(blocks)]


def _describe(ops: Sequence[Op], block: int, describer: _Describer) -> Any:
    internal = {name: [i, j] for i, op in enumerate(ops) for j, name in enumerate(op.outputs)}
    outside: dict[str, int] = {}
    described: list[Any] = []

    def wire(name: str) -> Any:
        if name in internal:
            return internal[name]
        return outside.setdefault(name, len(outside))

    for op in ops:
        described.append(
            [
                encode_call(op),
                [wire(name) for name in op.inputs],
                [describer.result(name, block) for name in op.outputs],
                [wire(describer.values[name].root) for name in op.outputs if describer.values[name].root in internal],
                [wire(name) for name in op.saved],
                [wire(name) for name in op.mutates],
                [op.saved_extra_bytes, op.flops_forward, op.flops_backward],
            ]
        )
    return [described, [describer.outside(name, block) for name in outside]]
