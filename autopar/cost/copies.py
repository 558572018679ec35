"""Copies: what products keep for backward in a form of its own, beside what its maker keeps.

A product by a trained parameter keeps its operand. Where the op that made it keeps it too (an attention, a rectifier),
and it comes in another sharding than it was made in, there are two. Of operands that a split product reads whole, the
product's own choice tells (`sheets`); whether others moved follows from the choices on both sides, and is known once
all are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopar.cost.kernels import work_kind
from autopar.cost.memory import slack_share
from autopar.cost.table import CostTables
from autopar.ir.cost import CostTable
from autopar.ir.graph import Op, Value
from autopar.ir.placement import Sharding
from autopar.ir.solution import Decisions
from autopar.ir.strategy import input_sharding, output_sharding


def copied_bytes(tables: CostTables, table: CostTable, decisions: Decisions, behind: int = 0) -> Mapping[int, float]:
    """Bytes of one microbatch on one device of the table's mesh that products of each block keep of moved operands;
    blocks without any are left out, and what is made before the block `behind`.
    """
    if not tables.training or table.mesh.num_devices == 1:
        return {}
    values, sizes = tables.graph.values, tables.tensors.at(table.num_microbatches).num_bytes
    ops = tables.fusion.graph.ops
    kept = {name for op in ops for name in op.saved if name in op.outputs}
    makers = {name: op for op in ops for name in op.outputs}
    slack = 1.0 + slack_share(tables.software, tables.cluster.spec.unseen_share)
    found: dict[int, float] = {}
    forms: set[tuple[str, Sharding]] = set()
    for op in ops:
        if op.block < behind or op.is_shared or not _keeps_operand(op, values) or op.name in tables.again:
            continue
        root = values[values[op.inputs[0]].root]
        if root.name not in kept or makers[root.name].block < behind or _is_read_whole(op, decisions):
            continue
        form = root.name, input_sharding(decisions.ops[op.name], 0)
        if form not in forms and _is_moved(op, makers, values, decisions):
            forms.add(form)
            size = float(sizes[tables.tensors.index[root.name]]) / _parts(form[1], table.mesh.sizes)
            found[op.block] = found.get(op.block, 0.0) + slack * size
    return found


def _keeps_operand(op: Op, values: Mapping[str, Value]) -> bool:
    """Whether it is a product whose first operand the gradient of another, a parameter, needs."""
    roots = [values[values[name].root] for name in op.inputs[1:]]
    return work_kind(op) == "gemm" and any(root.origin == "parameter" and root.requires_grad for root in roots)


def _is_moved(op: Op, makers: Mapping[str, Op], values: Mapping[str, Value], decisions: Decisions) -> bool:
    """Whether the first operand, or what it is a view of, changes its sharding on the way from its maker."""
    at, slot = op, 0
    while True:
        name = at.inputs[slot]
        maker = makers[name]
        held = output_sharding(decisions.ops[maker.name], maker.outputs.index(name))
        if _differ(held, input_sharding(decisions.ops[at.name], slot)):
            return True
        if values[name].root == name:
            return False
        root = values[name].root
        at, slot = maker, next(i for i, read in enumerate(maker.inputs) if values[read].root == root)


def _differ(held: Sharding, needed: Sharding) -> bool:
    pairs = zip(held, needed, strict=True)
    return any(a != b and not (a.holds_whole_value and b.holds_whole_value) for a, b in pairs)


def _is_read_whole(op: Op, decisions: Decisions) -> bool:
    strategy = decisions.ops[op.name]
    return any(axis.splits_work and axis.inputs[0].holds_whole_value for axis in strategy)


def _parts(sharding: Sharding, sizes: tuple[int, ...]) -> int:
    return math.prod(size for placement, size in zip(sharding, sizes, strict=True) if placement.is_shard)
