"""In words: how the ops of each class of blocks are split over the mesh axes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.ir.graph import Block, Op, OpGraph
from autopar.ir.solution import Decisions
from autopar.ir.strategy import AxisStrategy
from autopar.rules.batch import batch_dims
from autopar.rules.experts import EXCHANGING

WIDTH = 80
NAMED_DIMS = {
    ("linear", "dim1"): "sequence",
    ("scaled_dot_product_attention", "dim1"): "heads",
    ("scaled_dot_product_attention", "dim2"): "context",
}
BatchDims = Mapping[str, "int | None"]


@dataclass(frozen=True, slots=True)
class BlockSplit:
    """A run of alike blocks; `ops`: (what each axis divides, names of the heavy ops)."""

    blocks: str
    ops: tuple[tuple[str, str], ...]


def describe_blocks(decisions: Decisions, graph: OpGraph) -> list[str]:
    """One paragraph per run of alike blocks: the ops that do most of its work, by what each axis divides."""
    if all(axis.size == 1 for axis in decisions.extent.axes):
        return []
    lines = ["How the heavy ops are split (what each mesh axis divides)"]
    for split in block_splits(decisions, graph):
        lines.append(f"  {split.blocks}"[:WIDTH])
        for words, names in split.ops:
            text = f"{words}: {names}"
            lines += textwrap.wrap(
                text, WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False
            )
    return [*lines, ""]


def block_splits(decisions: Decisions, graph: OpGraph) -> tuple[BlockSplit, ...]:
    """Runs of neighbouring blocks whose heavy ops are split alike. Blocks without heavy ops are left out."""
    found = []
    for blocks, ops in _runs(decisions, graph, batch_dims(graph)):
        last = f" .. {blocks[-1].name}" if len(blocks) > 1 else ""
        count = f" ({len(blocks)} blocks)" if len(blocks) > 1 else ""
        found.append(BlockSplit(f"{blocks[0].name}{last}{count}", ops))
    return tuple(found)


def _runs(
    decisions: Decisions, graph: OpGraph, dims: BatchDims
) -> Iterator[tuple[list[Block], tuple[tuple[str, str], ...]]]:
    """Neighbouring blocks with one description, and that description."""
    run: list[Block] = []
    described: tuple[tuple[str, str], ...] = ()
    for block in graph.blocks:
        ops = _describe(decisions, graph, block, dims)
        if run and ops != described:
            yield run, described
            run = []
        if ops:
            run.append(block)
        described = ops
    if run:
        yield run, described


def _describe(decisions: Decisions, graph: OpGraph, block: Block, dims: BatchDims) -> tuple[tuple[str, str], ...]:
    names_by_words: dict[str, list[str]] = {}
    for op in _heavy_ops(graph, block):
        names_by_words.setdefault(_split_words(decisions, op, dims), []).append(_short_name(op, block))
    return tuple((words, ", ".join(dict.fromkeys(names))) for words, names in names_by_words.items())


def _heavy_ops(graph: OpGraph, block: Block) -> list[Op]:
    """Ops of the block with at least 1 % of its FLOPs, in order."""
    ops = [op for op in graph.ops[block.start : block.stop] if not op.is_shared]
    total = sum(op.flops_forward for op in ops)
    return [op for op in ops if op.flops_forward and op.flops_forward >= 0.01 * total]


def _split_words(decisions: Decisions, op: Op, dims: BatchDims) -> str:
    stage = next(k for k, stage in enumerate(decisions.stages) if op.block < stage.stop)
    pairs = zip(decisions.at(stage).mesh.axes, decisions.ops[op.name], strict=True)
    return ", ".join(f"{axis.name} {_axis_word(choice, op, dims)}" for axis, choice in pairs if axis.size > 1)


def _axis_word(choice: AxisStrategy, op: Op, dims: BatchDims) -> str:
    """The label, but `batch`, `sequence` and `heads` where those are split."""
    if choice.label in EXCHANGING:
        return choice.label
    for name, placement in zip((*op.outputs, *op.inputs), (*choice.outputs, *choice.inputs), strict=True):
        if placement.is_shard and dims.get(name) == placement.dim:
            return "batch"
    return NAMED_DIMS.get((op.target.split(".")[1], choice.label), choice.label)


def _short_name(op: Op, block: Block) -> str:
    """Module path inside the block for an op of a layer, else the op's own name."""
    name = op.target.removeprefix("aten.").removeprefix("autopar.").split(".")[0]
    if name not in ("linear", "addmm", "conv2d", "convolution", "embedding"):
        return name
    inside = op.module_path.removeprefix(block.name).strip(".")
    return inside or op.module_path or op.name
