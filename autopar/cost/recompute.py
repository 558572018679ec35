"""Recompute policies: what backward computes again inside a block, and which values then need not stay.

Which ops that is, `rules.recompute` says; this is what follows for time and memory. What enters a block always stays.

- `selective`: what enters a core stays, and what leaves it where a later op needs it.
- `selective-op`: the results that it keeps stay, needed or not. All other ops run again, up to the last that backward
  needs.
- `alternate`: every second layer runs again as a whole: as half of each op and half of each value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.cost.kernels import is_view
from autopar.cost.layouts import Codes
from autopar.ir.cost import Array
from autopar.ir.graph import Block, Op, OpGraph
from autopar.ir.solution import KEPT
from autopar.rules.recompute import block_ops, core_ops, kept_ops, layers
from autopar.rules.table import packet

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
    for block in layers(graph):
        found.update(rule(_Inside(graph, block, stored)))
    return found


class _Inside:
    """Ops of one block and where their values come from; `stored` are the roots that anything in the graph saves."""

    def __init__(self, graph: OpGraph, block: Block, stored: frozenset[str]) -> None:
        self.values = graph.values
        self.stored = stored
        self.ops = block_ops(graph, block)
        self.made = {graph.values[name].root for op in self.ops for name in op.outputs}

    def root(self, name: str) -> str:
        return self.values[name].root

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


def _selective(inside: _Inside) -> dict[str, Again]:
    reruns = core_ops(inside.ops, inside.values)
    enters = set[str]()
    made = {inside.root(name) for op in inside.ops if op.name in reruns for name in op.outputs if _owns(inside, name)}
    needed = {
        inside.root(name) for op in inside.ops if op.name not in reruns and _reads(inside, op) for name in op.inputs
    }
    dropped = made - needed
    found = {}
    for op in inside.ops:
        runs = op.name in reruns
        kept = {name: float(inside.root(name) not in dropped) for name in op.saved}
        for name in op.inputs if runs else ():
            value = inside.values[name]
            if value.origin == "op" and value.requires_grad and value.root not in made | inside.stored | enters:
                enters.add(value.root)
                kept[name] = 1.0
        found[op.name] = Again(float(runs), kept, float(not runs))
    return found


def _owns(inside: _Inside, name: str) -> bool:
    return inside.root(name) == name


def _reads(inside: _Inside, op: Op) -> bool:
    """Whether backward of `op` needs its operands."""
    return packet(op.target) not in LINEAR and not is_view(op, inside.values)


def _selective_op(inside: _Inside) -> dict[str, Again]:
    stays = kept_ops(inside.ops, inside.values)
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
