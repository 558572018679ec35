"""Recompute policies: what backward computes again inside a block, and which values then need not stay.

Blocks are told apart by structure alone. Policies work on the blocks whose sequence of calls occurs more than once (on
all but that of the loss where none does), and always keep what enters a block:

- `selective` (Korthikanti et al. 2022): the attention core runs again: every op on a path between products of two
  activations (scores, mask, softmax, dropout, context), a path ending where an op reads a parameter; a fused attention
  op is a core by itself. What enters the core stays, and what leaves it where a later op needs it.
- `selective-op` (torchtitan's per-op policy): results of fused attention and of every other product with a parameter,
  counted from the block's first, stay, needed or not. All other ops run again, up to the last that backward needs.
- `alternate`: every second block runs again as a whole: as half of each op and half of each value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.cost.kernels import is_view, packet, work_kind
from autopar.cost.layouts import Codes
from autopar.ir.cost import Array
from autopar.ir.graph import Block, Op, OpGraph
from autopar.ir.solution import KEPT

LINEAR = frozenset(
    ("add", "sub", "rsub", "neg", "clone", "contiguous", "reshape", "flatten", "cat", "to", "_to_copy", "type_as")
) | {"dropout", "native_dropout", "sum", "mean", "embedding"}  # fmt: skip
"""Ops whose backward reads no operand: at most a mask or an index."""


@dataclass(frozen=True)
class Again:
    """One op under a policy.

    Attributes:
        reruns: how often its forward runs again.
        kept: operand or result -> share of its storage that stays until backward, for every storage that this op
            answers for. What does not stay is there again while backward works on the block.
        extra: the same share for what is no value of the graph (masks, statistics).
    """

    reruns: float
    kept: Mapping[str, float]
    extra: float


def recomputed(graph: OpGraph, policy: str) -> Mapping[str, Again]:
    """Ops that `policy` changes anything for, by name.

    Raises:
        ValueError: for a policy that is not in `ir.solution.KEPT`.
    """
    if policy not in KEPT:
        raise ValueError(f"unknown policy {policy!r}; one of {', '.join(KEPT)}")
    if policy == "none":
        return {}
    stored = frozenset(graph.values[name].root for op in graph.ops for name in op.saved)
    rule = {"selective": _selective, "selective-op": _selective_op, "alternate": _alternate}[policy]
    found: dict[str, Again] = {}
    for block in _repeated(graph):
        found.update(rule(_Inside(graph, block, stored)))
    return found


def _repeated(graph: OpGraph) -> tuple[Block, ...]:
    calls = [tuple(op.target for op in graph.ops[b.start : b.stop] if not op.is_shared) for b in graph.blocks]
    times = Counter(calls)
    if max(times.values()) > 1:
        return tuple(block for block, own in zip(graph.blocks, calls, strict=True) if times[own] > 1)
    return tuple(b for b in graph.blocks if all(graph.loss not in op.outputs for op in graph.ops[b.start : b.stop]))


class _Inside:
    """Ops of one block and where their values come from; `stored` are the roots that anything in the graph saves."""

    def __init__(self, graph: OpGraph, block: Block, stored: frozenset[str]) -> None:
        self.values = graph.values
        self.stored = stored
        self.ops = tuple(op for op in graph.ops[block.start : block.stop] if not op.is_shared)
        self.made = {graph.values[name].root for op in self.ops for name in op.outputs}

    def root(self, name: str) -> str:
        return self.values[name].root

    def reads_parameter(self, op: Op) -> bool:
        return any(self.values[name].origin == "parameter" for name in op.inputs)

    @cached_property
    def entering(self) -> Mapping[str, tuple[str, str]]:
        """Root -> (first op that reads it, name it is read by), of what other blocks made with a gradient."""
        found: dict[str, tuple[str, str]] = {}
        for op in self.ops:
            for name in op.inputs:
                value = self.values[name]
                if value.origin == "op" and value.requires_grad and value.root not in self.made:
                    found.setdefault(value.root, (op.name, name))
        return found

    @cached_property
    def products(self) -> tuple[Op, ...]:
        """Products with a parameter."""
        return tuple(op for op in self.ops if work_kind(op) == "gemm" and not op.members and self.reads_parameter(op))


def _spread(inside: _Inside, core: Iterable[str], *, forwards: bool) -> set[str]:
    """Names of ops after (or before) those of `core`, up to ops that read parameters; core included."""
    found = set(core)
    reached = {name for op in inside.ops if op.name in found for name in (op.outputs if forwards else op.inputs)}
    for op in inside.ops if forwards else reversed(inside.ops):
        ends, others = (op.inputs, op.outputs) if forwards else (op.outputs, op.inputs)
        if op.name not in found and reached.intersection(ends) and not inside.reads_parameter(op):
            found.add(op.name)
        if op.name in found:
            reached.update(others)
    return found


def _selective(inside: _Inside) -> dict[str, Again]:
    kinds = {op.name: work_kind(op) for op in inside.ops}
    core = [
        op.name
        for op in inside.ops
        if kinds[op.name] == "attention" or (kinds[op.name] == "gemm" and not inside.reads_parameter(op))
    ]
    reruns = _spread(inside, core, forwards=True) & _spread(inside, core, forwards=False)
    made = {inside.root(name) for op in inside.ops if op.name in reruns for name in op.outputs if _owns(inside, name)}
    needed = {
        inside.root(name) for op in inside.ops if op.name not in reruns and _reads(inside, op) for name in op.inputs
    }
    dropped = made - needed
    return {
        op.name: Again(
            float(op.name in reruns),
            {name: float(inside.root(name) not in dropped) for name in op.saved},
            float(op.name not in reruns),
        )
        for op in inside.ops
    }


def _owns(inside: _Inside, name: str) -> bool:
    return inside.root(name) == name


def _reads(inside: _Inside, op: Op) -> bool:
    """Whether backward of `op` needs its operands."""
    return packet(op.target) not in LINEAR and not is_view(op, inside.values)


def _selective_op(inside: _Inside) -> dict[str, Again]:
    stays = {op.name for op in inside.products[::2]} | {op.name for op in inside.ops if work_kind(op) == "attention"}
    results = {inside.root(name) for op in inside.ops if op.name in stays for name in op.outputs}
    dropped = inside.made - results
    lost = {inside.root(name) for op in inside.ops for name in op.saved} & dropped
    last = max((i for i, op in enumerate(inside.ops) if lost.intersection(map(inside.root, op.outputs))), default=-1)
    found = {}
    for i, op in enumerate(inside.ops):
        kept = {name: float(inside.root(name) not in dropped) for name in op.saved}
        if op.name in stays:
            kept |= {name: 1.0 for name in op.outputs if _owns(inside, name) and name not in inside.stored}
        runs = op.name not in stays and i <= last
        found[op.name] = Again(float(runs), kept | _entering(inside, op, 1.0), float(op.name in stays))
    return found


def _alternate(inside: _Inside) -> dict[str, Again]:
    return {
        op.name: Again(
            0.5,
            {name: 0.5 if inside.root(name) in inside.made else 1.0 for name in op.saved} | _entering(inside, op, 0.5),
            0.5,
        )
        for op in inside.ops
    }


def _entering(inside: _Inside, op: Op, share: float) -> dict[str, float]:
    """What enters the block at `op` and is kept for the policy alone."""
    found = inside.entering.items()
    return {name: share for root, (reader, name) in found if reader == op.name and root not in inside.stored}


@dataclass(frozen=True)
class Reruns:
    """A policy on the ops of a sheet.

    Attributes:
        times, extra: [op], as in `Again`.
        block: [op], number of the block for ops that the policy works on, else -1.
    """

    times: Array
    extra: Array
    block: Codes

    @property
    def is_empty(self) -> bool:
        return not np.any(self.block >= 0)


def make_reruns(ops: Sequence[Op], again: Mapping[str, Again]) -> Reruns:
    """Of `ops`, in order."""
    found = [again.get(op.name) for op in ops]
    return Reruns(
        np.array([0.0 if one is None else one.reruns for one in found]),
        np.array([1.0 if one is None else one.extra for one in found]),
        np.array([-1 if one is None else op.block for op, one in zip(ops, found, strict=True)], dtype=np.int64),
    )
