"""Finds where a plan switches from data to tensor parallelism, and lets it run in passes from there (`ir.passes`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.errors import InputError
from autopar.ir.graph import Op, OpGraph
from autopar.ir.offload import Offload
from autopar.ir.partition import StagePart, partition
from autopar.ir.passes import EACH_PASS, EACH_STEP, ORDERS, SHARES, TURNS, Passes
from autopar.ir.placement import Sharding, format_sharding, local_shape
from autopar.ir.solution import Decisions, Pins
from autopar.ir.strategy import input_sharding, output_sharding
from autopar.rules.batch import batch_dims
from autopar.rules.call import argument
from autopar.rules.elementwise import MEAN
from autopar.rules.table import packet

TOKEN_LOSS = "autopar.token_loss"
LOSSES = {"cross_entropy_loss": 3, "nll_loss": 3, "mse_loss": 2, "l1_loss": 2, TOKEN_LOSS: 3}
"""Losses that may be a mean over samples, and where their argument `reduction` stands."""
COMPLETE = ("invariant", "sharded")
"""Labels of parameters whose gradients no rank has to sum."""
PLAIN_SCHEDULES = ("gpipe", "1f1b")
"""In which a backward runs as one."""
NO_SWITCH = (
    "passes need a switch from data to tensor parallelism: blocks that split samples over some ranks and, on the same "
    "stage, blocks behind that split features over the same ranks; the plan has none, or inside a block (then pin what "
    "comes before it, e.g. op:flatten.*=dim0)"
)


@dataclass(frozen=True)
class Switch:
    """Where samples split over an axis become features split over it.

    Attributes:
        block: the first behind.
        axis: index into the mesh.
        outer: ranks of the axes before it that split samples too.
        behind: what runs from there on.
        dims: of every value of the graph, which counts samples.
    """

    block: int
    axis: int
    outer: int
    behind: StagePart
    dims: Mapping[str, int | None]


def with_passes(graph: OpGraph, decisions: Decisions, pins: Pins) -> Decisions:
    """The decisions with the passes that are pinned, or as they are.

    Args:
        graph: captured at the global batch size.

    Raises:
        InputError: the plan cannot run in such passes; says why.
    """
    if pins.pass_order is None:
        return decisions
    switch = find_switch(graph, decisions)
    ranks = decisions.mesh.sizes[switch.axis]
    count = pins.num_passes or ranks
    passes = Passes(
        switch.block, decisions.mesh.axes[switch.axis].name, count, pins.pass_order, pins.pass_update or EACH_STEP
    )
    reasons = [*_counts(graph, decisions, switch, passes), *_fitting(graph, decisions, switch, passes)]
    if reasons:
        raise InputError(f"the plan cannot run in passes behind block {_name(graph, switch.block - 1)}: {reasons[0]}")
    return replace(decisions, passes=passes)


def find_switch(graph: OpGraph, decisions: Decisions) -> Switch:
    """The first block of the last stage from which on an axis splits no more samples, but all before.

    Raises:
        InputError: there is none.
    """
    is_piped = decisions.num_ranks > 1
    others = (
        (graph.is_inference, "inference"),
        (bool(decisions.stage_meshes), "different meshes per stage"),
        (decisions.interleave > 1, "several chunks per pipeline rank"),
        (decisions.offload != Offload(), "offloading"),
        (is_piped and decisions.schedule not in PLAIN_SCHEDULES, f"the schedule {decisions.schedule}"),
    )
    for is_so, words in others:
        if is_so:
            raise InputError(f"passes behind a switch (owt=b, owt=c, switch=...) and {words}: leave one of them out")
    labels = [strategy[i].label for strategy in decisions.parameters.values() for i in range(len(strategy))]
    if "sharded" not in labels:
        raise InputError(NO_SWITCH)
    dims, last = batch_dims(graph), decisions.stages[-1]
    for block in range(last.start + 1, last.stop):
        stages = (*decisions.stages[:-1], replace(last, stop=block), replace(last, start=block))
        part = partition(graph, stages)[-1]
        for axis, size in enumerate(decisions.mesh.sizes):
            outer = _switches(graph, decisions, part, axis, dims) if size > 1 else None
            if outer is not None:
                return Switch(block, axis, outer, part, dims)
    raise InputError(NO_SWITCH)


def _switches(
    graph: OpGraph, decisions: Decisions, part: StagePart, axis: int, dims: Mapping[str, int | None]
) -> int | None:
    """Ranks of outer axes that split samples too, if the axis splits those of all that the part receives, and of
    nothing that the part makes of it, while it is redistributed on no other axis; else None.
    """
    producers = graph.producers()
    forms = {n: _kept(decisions, producers[n], n) for n in part.received}
    splitters = {tuple(_splitters(form, dims[n], decisions)) for n, form in forms.items()}
    if any(not axes or axes[-1] != axis for axes in splitters):
        return None
    readers = [op for _, ops in part.blocks for op in ops if set(op.inputs) & forms.keys() or _trains(graph, op)]
    if len(splitters) != 1 or any(_splits_samples(decisions, op, axis, dims) for op in readers):
        return None
    if not any(_trains(graph, op) for op in readers) or _moves_elsewhere(decisions, readers, forms, axis):
        return None
    (all_axes,) = splitters
    return math.prod(decisions.mesh.sizes[i] for i in all_axes[:-1])


def _moves_elsewhere(decisions: Decisions, readers: Sequence[Op], forms: Mapping[str, Sharding], axis: int) -> bool:
    """Some reader needs a received value in another placement than it has, on another axis than the passes'."""
    others = [i for i, size in enumerate(decisions.mesh.sizes) if size > 1 and i != axis]
    for op in readers:
        needed = [(forms[n], input_sharding(decisions.ops[op.name], i)) for i, n in enumerate(op.inputs) if n in forms]
        if any(have[i] != need[i] for have, need in needed for i in others):
            return True
    return False


def _kept(decisions: Decisions, producer: Op, name: str) -> Sharding:
    """As `rewrite.layout` keeps it."""
    return decisions.hubs.get(name) or output_sharding(decisions.ops[producer.name], producer.outputs.index(name))


def _splitters(form: Sharding, dim: int | None, decisions: Decisions) -> list[int]:
    """Axes longer than one that split this dim, outermost first."""
    sizes = decisions.mesh.sizes
    return [i for i, placement in enumerate(form) if placement.is_shard and placement.dim == dim and sizes[i] > 1]


def _trains(graph: OpGraph, op: Op) -> bool:
    return any(graph.values[n].origin == "parameter" for n in op.inputs)


def _splits_samples(decisions: Decisions, op: Op, axis: int, dims: Mapping[str, int | None]) -> bool:
    strategy = decisions.ops[op.name]
    forms = [(n, input_sharding(strategy, i)[axis]) for i, n in enumerate(op.inputs)]
    forms += [(n, output_sharding(strategy, i)[axis]) for i, n in enumerate(op.outputs)]
    return any(form.is_shard and form.dim == dims[n] for n, form in forms)


def _counts(graph: OpGraph, decisions: Decisions, switch: Switch, passes: Passes) -> Iterator[str]:
    """What is wrong with the number of passes."""
    ranks = decisions.mesh.sizes[switch.axis]
    own = graph.batch_size // decisions.num_microbatches // (switch.outer * ranks)
    if passes.count < 2:
        yield "a single pass is no passes at all"
    if passes.order == TURNS and passes.count != ranks:
        yield f"in passes by turns each of the {ranks} ranks has one, not {passes.count} in all"
    if passes.order != TURNS and own % passes.count:
        yield f"the {own} samples of each rank do not divide into {passes.count} passes"


def _fitting(graph: OpGraph, decisions: Decisions, switch: Switch, passes: Passes) -> Iterator[str]:
    """What of the blocks behind cannot run in passes."""
    behind, dims = switch.behind, switch.dims
    ops = [op for _, ops in behind.blocks for op in ops]
    if not any(graph.values[n].requires_grad for n in behind.received):
        yield "no gradient flows back through the switch"
    for op in ops:
        if op.mutates:
            yield f"{op.name} ({op.module_path}) updates {op.mutates[0]} from the samples that it sees (a batch norm?)"
        if "dropout" in op.target and dims[op.outputs[0]] != 0:
            yield f"{op.name} ({op.module_path}) drops elements of a tensor whose first dim does not count samples"
    yield from _parts(graph, decisions, switch, passes)
    yield from _loss(graph)
    before = partition(graph, replace(decisions, passes=passes).split_at_switch().stages)[:-1]
    elsewhere = {n for part in before for n in part.outside}
    for name in (n for n in behind.outside if graph.values[n].origin == "parameter"):
        fqn = graph.values[name].fqn
        labels = {s.label for s, size in zip(decisions.parameters[name], decisions.mesh.sizes, strict=True) if size > 1}
        if name in elsewhere:
            yield f"{fqn} is read on both sides of the switch"
        if labels & {"zero2", "zero3"}:
            yield f"{fqn} is stored as {', '.join(sorted(labels))}, whose gradient is scattered in every pass"
        if passes.update == EACH_PASS and not labels <= set(COMPLETE):
            words = ", ".join(sorted(labels - set(COMPLETE)))
            yield f"{fqn} would be updated after each pass, but its gradient is first summed over ranks ({words})"


def _parts(graph: OpGraph, decisions: Decisions, switch: Switch, passes: Passes) -> Iterator[str]:
    """What of a pass does not divide over the ranks."""
    parts = decisions.num_microbatches * passes.count
    for op in (op for _, ops in switch.behind.blocks for op in ops):
        strategy = decisions.ops[op.name]
        forms = [(n, input_sharding(strategy, i)) for i, n in enumerate(op.inputs)]
        forms += [(n, output_sharding(strategy, i)) for i, n in enumerate(op.outputs)]
        for name, form in forms:
            shape, dim = list(graph.values[name].meta.shape), switch.dims[name]
            if dim is not None and shape[dim] % parts:
                yield f"{name} of shape {shape} does not divide into {parts} parts"
                return
            if dim is not None:
                shape[dim] //= parts
            if local_shape(shape, form, decisions.mesh.sizes) is None:
                yield f"{name}, of shape {shape} in a pass, does not divide into {format_sharding(form)}"
                return


def _loss(graph: OpGraph) -> Iterator[str]:
    """The loss must be a mean over samples, so that the mean over passes is that over all."""
    op = graph.producers()[graph.loss]
    name = packet(op.target)
    if name == "mean":
        return
    position = LOSSES.get(name)
    if position is None or argument(op, position, "reduction", MEAN) != MEAN:
        yield f"the loss {graph.loss} ({op.target}) is not known to be a mean over samples"
    elif name in ("cross_entropy_loss", "nll_loss") and argument(op, 2, "weight", None) is not None:
        yield f"the loss {graph.loss} weighs classes: a mean over passes would be another than that over all samples"


def _name(graph: OpGraph, block: int) -> str:
    return graph.blocks[block].name


def schemes(graph: OpGraph, decisions: Decisions, pins: Pins | None = None) -> Iterator[Decisions]:
    """The schemes in which a plan can run, as pinned or, without pins, exact; none where it has no switch.

    Where the number of passes is free, they are two, four, and as many as ranks.
    """
    asked = [Pins(pass_order=order) for order in ORDERS] if pins is None else [pins]
    ranks = {axis.size for axis in decisions.mesh.axes if axis.size > 1}
    for own in asked:
        is_free = own.pass_order == SHARES and own.num_passes is None
        for count in sorted({2, 4} | ranks) if is_free else (own.num_passes,):
            try:
                yield with_passes(graph, decisions, replace(own, num_passes=count))
            except InputError:
                continue
