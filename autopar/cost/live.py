"""Live: what a stage holds at its worst moment where nothing is kept for backward.

Values go when nothing in their block reads them any more; what enters a block, and what shared ops make, stays until
the block, or the stage, is over. Views take no memory of their own, and slices neither; other redistributed copies live
while the op that reads them runs. Outputs and batch inputs last for the whole step and are counted elsewhere
(`ir.graph.Op.saved`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from autopar.ir.graph import Op, OpGraph, Value
from autopar.ir.partition import StagePart, partition
from autopar.ir.placement import Sharding
from autopar.ir.solution import Decisions
from autopar.ir.strategy import input_sharding, output_sharding


def most_live(graph: OpGraph, values: Mapping[str, Value], decisions: Decisions) -> tuple[float, ...]:
    """Bytes on one device of every stage at the worst moment of one microbatch.

    Args:
        graph: at the global batch size.
        values: of the graph, at the size of a microbatch.
        decisions: of a plan.
    """
    sizes = _Sizes(graph, values, decisions)
    return tuple(_of_stage(part, sizes) for part in partition(graph, decisions.stages))


class _Sizes:
    """Local bytes of storages and of copies."""

    def __init__(self, graph: OpGraph, values: Mapping[str, Value], decisions: Decisions) -> None:
        self.values, self.decisions = values, decisions
        self.makers = graph.producers()
        self.lasting = {values[name].root for op in graph.ops for name in op.saved}

    def root(self, name: str) -> str | None:
        """Storage that holds the value and is counted here."""
        root = self.values[name].root
        return root if self.values[root].origin == "op" and root not in self.lasting else None

    def stored(self, root: str) -> float:
        """Bytes of a storage."""
        return self._local(root, self._made(root))

    def copied(self, op: Op) -> float:
        """Bytes of operands that are brought into another form for this op."""
        found = 0.0
        for i, name in enumerate(op.inputs):
            if self.values[name].origin == "op":
                held = self.decisions.hubs.get(name) or self._made(name)
                needed = input_sharding(self.decisions.ops[op.name], i)
                found += self._local(name, needed) if _moves(held, needed) else 0.0
        return found

    def _made(self, name: str) -> Sharding:
        op = self.makers[name]
        return output_sharding(self.decisions.ops[op.name], op.outputs.index(name))

    def _local(self, name: str, sharding: Sharding) -> float:
        axes = zip(sharding, self.decisions.mesh.sizes, strict=True)
        return self.values[name].meta.num_bytes / math.prod(size for p, size in axes if p.is_shard)


def _moves(held: Sharding, needed: Sharding) -> bool:
    """Whether more than slicing lies between the two forms."""
    pairs = zip(held, needed, strict=True)
    return any(a != b and not (a.holds_whole_value and (b.is_shard or b.holds_whole_value)) for a, b in pairs)


def _of_stage(part: StagePart, sizes: _Sizes) -> float:
    blocks = [ops for _, ops in part.blocks]
    last = {root: index for index, ops in enumerate(blocks) for root in _read(ops, sizes)}
    last |= dict.fromkeys(_roots(part.sent, sizes), len(blocks))
    entered = _roots((*part.received, *(name for op in part.shared for name in op.outputs)), sizes)
    most = 0.0
    for index, ops in enumerate(blocks):
        entered = {root for root in entered if last.get(root, -1) >= index}
        lasting = {root for root, when in last.items() if when > index}
        most = max(most, sum(map(sizes.stored, sorted(entered))) + _of_block(ops, entered, lasting, sizes))
        entered |= _roots((name for op in ops for name in op.outputs), sizes) & lasting
    return most


def _of_block(ops: Sequence[Op], entered: set[str], lasting: set[str], sizes: _Sizes) -> float:
    """Bytes beside those that entered; storages of `lasting` are read by later blocks."""
    last = {root: index for index, op in enumerate(ops) for root in _read((op,), sizes)}
    alive: dict[str, float] = {}
    most = 0.0
    for index, op in enumerate(ops):
        made = _roots(op.outputs, sizes) - entered - alive.keys()
        alive |= {root: sizes.stored(root) for root in sorted(made)}
        most = max(most, sum(alive.values()) + sizes.copied(op))
        alive = {root: size for root, size in alive.items() if last.get(root, -1) > index or root in lasting}
    return most


def _roots(names: Iterable[str], sizes: _Sizes) -> set[str]:
    return {root for root in map(sizes.root, names) if root is not None}


def _read(ops: Sequence[Op], sizes: _Sizes) -> set[str]:
    return _roots((name for op in ops for name in op.inputs), sizes)
