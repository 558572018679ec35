"""Checks of a rewritten segment against the plan: every op is there, and every operand is in the form it needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from autopar.errors import RewriteError
from autopar.ir.graph import Op
from autopar.ir.placement import INVARIANT, REPLICATE, Sharding, format_sharding
from autopar.program.stage import Segment
from autopar.program.stream import buffer_for_update
from autopar.rewrite.layout import Layout


def check_segment(segment: Segment, ops: Sequence[Op], layout: Layout) -> None:
    """Compare the built graph with the plan.

    Raises:
        RewriteError: listing every disagreement.
    """
    segment.module.graph.lint()
    nodes = {node.meta["op"]: node for node in segment.nodes if "op" in node.meta}
    issues: list[str] = []
    for op in ops:
        if op.members and all(m.name in nodes for m in op.members):
            continue
        if op.name not in nodes:
            issues.append(f"{op.name}: missing from the program")
        else:
            issues += _operand_issues(op, nodes[op.name], layout)
    if issues:
        raise RewriteError(f"segment {segment.name} does not follow the plan:\n  " + "\n  ".join(issues))


def _operand_issues(op: Op, node: fx.Node, layout: Layout) -> list[str]:
    """Each tensor operand stands for the right value in the placement that the op's strategy requires."""
    found = [_origin(operand) for operand in node.all_input_nodes]
    held = {(n.meta["value"], _normal(n.meta["sharding"], layout, n.meta["value"])) for n in found if "value" in n.meta}
    issues = []
    for index, name in enumerate(op.inputs):
        needed = _normal(layout.needed(op, index), layout, name)
        if (name, needed) not in held:
            issues.append(f"{op.name}: input {name} is not held as {format_sharding(needed)}")
        if name in op.mutates and any(p != INVARIANT for p in needed):
            issues.append(f"{op.name}: updates {name} in place while it is {format_sharding(needed)}")
    return issues


def _origin(node: fx.Node) -> fx.Node:
    """The value behind a buffer that is guarded against double updates."""
    first = node.args[0] if node.target is buffer_for_update else node
    return first if isinstance(first, fx.Node) else node


def _normal(sharding: Sharding, layout: Layout, name: str) -> Sharding:
    """I in place of R where no gradient flows, and on axes of one rank."""
    has_grad = layout.graph.values[name].requires_grad
    return tuple(
        INVARIANT if size == 1 or (p == REPLICATE and not has_grad) else p
        for p, size in zip(sharding, layout.axis_sizes, strict=True)
    )
