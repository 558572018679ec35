"""In words: how the ops of each class of blocks are split over the mesh axes."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.ir.graph import Block, Op, OpGraph
from autopar.ir.solution import Decisions

WIDTH = 80
MAX_ROWS_PER_CLASS = 12


def describe_blocks(decisions: Decisions, graph: OpGraph) -> list[str]:
    """One paragraph per block class: the ops that do most of its work and what each axis splits."""
    if all(axis.size == 1 for axis in decisions.mesh.axes):
        return []
    lines = ["How the heavy ops are split (what each mesh axis divides)"]
    for blocks in _classes(graph):
        lines += _describe_class(decisions, graph, blocks)
    return [*lines, ""]


def _classes(graph: OpGraph) -> list[list[Block]]:
    by_class: dict[str, list[Block]] = {}
    for block in graph.blocks:
        by_class.setdefault(block.class_id, []).append(block)
    return list(by_class.values())


def _describe_class(decisions: Decisions, graph: OpGraph, blocks: list[Block]) -> Iterator[str]:
    first = blocks[0]
    ops = _heavy_ops(graph, first)
    if not ops:
        return
    count = f"{len(blocks)} x " if len(blocks) > 1 else ""
    last = f" .. {blocks[-1].name}" if len(blocks) > 1 else ""
    yield f"  {count}{first.name}{last}"[:WIDTH]
    for words, names in _grouped(decisions, ops).items():
        shown = ", ".join(names)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        yield f"    {shown:<40} {words}"[:WIDTH].rstrip()


def _heavy_ops(graph: OpGraph, block: Block) -> list[Op]:
    """Ops of the block with at least 1 % of its FLOPs, at most MAX_ROWS_PER_CLASS of them, in order."""
    ops = [op for op in graph.ops[block.start : block.stop] if not op.is_shared]
    total = sum(op.flops_forward for op in ops)
    heavy = [op for op in ops if op.flops_forward and op.flops_forward >= 0.01 * total]
    kept = {op.name for op in sorted(heavy, key=lambda op: (-op.flops_forward, op.name))[:MAX_ROWS_PER_CLASS]}
    return [op for op in heavy if op.name in kept]


def _grouped(decisions: Decisions, ops: list[Op]) -> dict[str, list[str]]:
    """Short names of ops, by how they are split."""
    names_by_words: dict[str, list[str]] = {}
    for op in ops:
        names_by_words.setdefault(_split_words(decisions, op), []).append(_short_name(op))
    return {words: list(dict.fromkeys(names)) for words, names in names_by_words.items()}


def _split_words(decisions: Decisions, op: Op) -> str:
    strategy = decisions.ops[op.name]
    pairs = zip(decisions.mesh.axes, strategy, strict=True)
    return ", ".join(f"{axis.name} {choice.label}" for axis, choice in pairs if axis.size > 1)


def _short_name(op: Op) -> str:
    """`attn.c_proj`: the last two parts of the module path for an op of a layer, else the op's own name."""
    parts = [part for part in op.module_path.split(".") if part]
    name = op.target.removeprefix("aten.").split(".")[0]
    if name in ("linear", "addmm", "conv2d", "convolution", "embedding"):
        return ".".join(parts[-2:]) if parts else op.name
    return name
