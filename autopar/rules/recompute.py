"""What backward computes again: the ops that each policy of `ir.solution.RECOMPUTE` names, block by block.

`full` is about every block. The other policies work on the layers: blocks that multiply by a parameter, but for that
of the loss:

- `selective` (Korthikanti et al. 2022): the attention core runs again: every op on a path between products of two
  activations (scores, mask, softmax, dropout, context), a path ending where an op reads a parameter; a fused attention
  op is a core by itself. Everything outside keeps what it saves.
- `selective-op` (torchtitan's per-op policy): the block runs again from its inputs, but the results of fused attention
  and of every other product with a parameter, counted from the block's first, are kept for that.
- `alternate`: every second layer runs again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autopar.ir.graph import Block, Op, OpGraph
from autopar.rules.call import Values
from autopar.rules.table import packet

GEMMS = frozenset(("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "einsum", "autopar.moe_experts"))
ATTENTIONS = frozenset(("scaled_dot_product_attention",))


@dataclass(frozen=True)
class BlockRecompute:
    """What backward of one block computes again.

    Attributes:
        whole: the block runs again from its inputs.
        kept: ops of it whose results are kept, so that they do not run again; their operands are made again.
        cores: where not the whole block does, the ops that run again, in groups that each start from what enters them.
    """

    whole: bool = False
    kept: frozenset[str] = frozenset()
    cores: tuple[tuple[Op, ...], ...] = ()


def recompute_by_block(graph: OpGraph, policy: str) -> Mapping[int, BlockRecompute]:
    """What `policy`, one of `ir.solution.RECOMPUTE`, means, by block index; other blocks keep everything."""
    if policy == "full":
        return {block.index: BlockRecompute(whole=True) for block in graph.blocks}
    chosen = layers(graph)
    if policy == "alternate":
        return {block.index: BlockRecompute(whole=True) for block in chosen[1::2]}
    if policy == "selective-op":
        return {b.index: BlockRecompute(whole=True, kept=kept_ops(block_ops(graph, b), graph.values)) for b in chosen}
    if policy == "selective":
        return {b.index: BlockRecompute(cores=attention_cores(block_ops(graph, b), graph.values)) for b in chosen}
    return {}


def layers(graph: OpGraph) -> tuple[Block, ...]:
    """Blocks that partial policies work on; without any that multiplies by a parameter, all but that of the loss."""
    others = [b for b in graph.blocks if all(graph.loss not in op.outputs for op in block_ops(graph, b))]
    found = [b for b in others if any(_is_product(op, graph.values) for op in block_ops(graph, b))]
    return tuple(found or others)


def block_ops(graph: OpGraph, block: Block) -> tuple[Op, ...]:
    """The block's own ops, in execution order."""
    return tuple(op for op in graph.ops[block.start : block.stop] if not op.is_shared)


def reads_parameter(op: Op, values: Values) -> bool:
    """Whether an operand is a parameter, or a view of one."""
    return any(values[values[name].root].origin == "parameter" for name in op.inputs)


def _is_product(op: Op, values: Values) -> bool:
    return packet(op.target) in GEMMS and reads_parameter(op, values)


def kept_ops(ops: Sequence[Op], values: Values) -> frozenset[str]:
    """Names of the ops of a block whose results `selective-op` keeps."""
    products = [op.name for op in ops if not op.members and _is_product(op, values)]
    return frozenset((*products[::2], *(op.name for op in ops if packet(op.target) in ATTENTIONS)))


def core_ops(ops: Sequence[Op], values: Values) -> frozenset[str]:
    """Names of the ops of a block that `selective` runs again."""
    products = {
        op.name
        for op in ops
        if packet(op.target) in ATTENTIONS or (packet(op.target) in GEMMS and not reads_parameter(op, values))
    }
    return frozenset(_spread(ops, values, products, forwards=True) & _spread(ops, values, products, forwards=False))


def _spread(ops: Sequence[Op], values: Values, starts: Iterable[str], *, forwards: bool) -> set[str]:
    """Names of ops after (or before) those of `starts`, up to ops that read parameters; `starts` included."""
    found = set(starts)
    reached: set[str] = set()
    for op in ops if forwards else reversed(ops):
        ends, others = (op.inputs, op.outputs) if forwards else (op.outputs, op.inputs)
        if op.name in found or (not reached.isdisjoint(ends) and not reads_parameter(op, values)):
            found.add(op.name)
            reached.update(others)
    return found


def attention_cores(ops: Sequence[Op], values: Values) -> tuple[tuple[Op, ...], ...]:
    """`core_ops` in groups of ops that read one another; single ops where others would have to run in between."""
    names = core_ops(ops, values)
    groups: list[list[Op]] = []
    for op in (op for op in ops if op.name in names):
        near = [g for g in groups if any(not set(each.outputs).isdisjoint(op.inputs) for each in g)]
        groups = [g for g in groups if g not in near]
        groups.append([*(each for g in near for each in g), op])
    cores: list[tuple[Op, ...]] = []
    for group in groups:
        inside = {op.name for op in group}
        ordered = tuple(op for op in ops if op.name in inside)
        cores += [ordered] if _is_unit(ops, ordered) else [(op,) for op in ordered]
    return tuple(cores)


def _is_unit(ops: Sequence[Op], core: Sequence[Op]) -> bool:
    """Whether no op outside stands on a way between two ops of the core."""
    inside = {op.name for op in core}
    return all(op.name in inside for op in _below(ops, core) if not _leads_nowhere(ops, op, inside))


def _below(ops: Sequence[Op], starts: Sequence[Op]) -> list[Op]:
    """Ops that read from `starts`, directly or not."""
    reached = {name for op in starts for name in op.outputs}
    found = []
    for op in ops:
        if not reached.isdisjoint(op.inputs):
            found.append(op)
            reached.update(op.outputs)
    return found


def _leads_nowhere(ops: Sequence[Op], op: Op, inside: set[str]) -> bool:
    return all(each.name not in inside for each in _below(ops, [op]))


def with_cores_together(ops: Sequence[Op], cores: Sequence[tuple[Op, ...]]) -> tuple[tuple[Op, ...], ...]:
    """The ops of a block in groups of one op, or of a core, in an order in which they can run."""
    items: list[tuple[Op, ...]] = [(op,) for op in ops]
    for core in cores:
        names = {op.name for op in core}
        positions = [i for i, item in enumerate(items) if item[0].name in names]
        first, stop = positions[0], positions[-1] + 1
        made = {name for op in core for name in op.outputs}
        before: list[tuple[Op, ...]] = []
        after: list[tuple[Op, ...]] = []
        for item in (item for item in items[first:stop] if item[0].name not in names):
            depends = any(not made.isdisjoint(op.inputs) for op in item)
            made |= {name for op in item for name in op.outputs} if depends else set()
            (after if depends else before).append(item)
        items[first:stop] = [*before, core, *after]
    return tuple(items)
