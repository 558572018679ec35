"""Mixture-of-experts regions: a sort of the tokens by expert, what happens in that order, and the way back.

Within such a region a tensor's dim 0 runs over (token, choice) pairs in an order that depends on the data, so no op
inside can be split on its own. As a whole it can: its inputs and its output run over tokens in the given order, and
a shard of the tokens gives exactly that shard of the output, since each row's result depends on its own token, its
expert id and its weight alone, and the expert parameters.

Pattern, found without looking at names of modules:

1. `sort` (or `argsort`) of a one-dimensional integer tensor, the expert ids: gives a permutation;
2. an inverse of that permutation: `index_put(x, (perm,), arange)`, `scatter(x, 0, perm, arange)` or `argsort(perm)`;
3. `index(x, (inverse,))`, the exit. The region is every op on a path from 1 to 3, and the ops that feed nothing else
   and read at most parameters (`arange`, transposed expert weights).

A region whose inner values are read outside is left as it is.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Arg, Op, Ref, Value

REGION = "autopar.moe_experts"
SORTS = ("aten.sort.default", "aten.sort.stable", "aten.argsort.default", "aten.argsort.stable")


def fold_regions(ops: list[Op], values: dict[str, Value]) -> list[Op]:
    """Replace every region by one op that stands at the place of its exit."""
    consumers: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for name in op.inputs:
            consumers.setdefault(name, []).append(index)
    folded: dict[int, Op] = {}
    gone: set[int] = set()
    for index, op in enumerate(ops):
        if op.target in SORTS and index not in gone and _sorts_ids(op, values):
            members = _find_region(index, ops, values, consumers)
            if members is not None:
                gone.update(members)
                folded[max(members)] = _region_op([ops[i] for i in sorted(members)], values)
    return [folded.get(i, op) for i, op in enumerate(ops) if i in folded or i not in gone]


def _sorts_ids(op: Op, values: dict[str, Value]) -> bool:
    meta = values[op.inputs[0]].meta
    return len(meta.shape) == 1 and meta.dtype.startswith("int")


def _find_region(
    start: int, ops: list[Op], values: dict[str, Value], consumers: dict[str, list[int]]
) -> set[int] | None:
    """Indices of the region's ops, or None if there is no exit or an inner value leaks."""
    descendants = _descendants(start, ops, consumers)
    permutation = ops[start].outputs[-1]
    inverses = {ops[i].outputs[-1] for i in descendants if _inverts(ops[i], permutation)}
    exits = [i for i in descendants if ops[i].target == "aten.index.Tensor" and ops[i].inputs[1:2]
             and ops[i].inputs[1] in inverses]  # fmt: skip
    if len(exits) != 1:
        return None
    region = descendants & _ancestors(exits[0], ops)
    region.add(exits[0])
    region |= _feeders(region, ops, values, consumers)
    leaks = any(
        reader not in region
        for i in region - {exits[0]}
        for name in ops[i].outputs
        for reader in consumers.get(name, ())
    )
    return None if leaks else region


def _inverts(op: Op, permutation: str) -> bool:
    if op.target in ("aten.argsort.default", "aten.argsort.stable", "aten.sort.default", "aten.sort.stable"):
        return op.inputs == (permutation,)
    if op.target in ("aten.index_put.default", "aten.scatter.src"):
        return op.inputs[1:2] == (permutation,)
    return False


def _descendants(start: int, ops: list[Op], consumers: dict[str, list[int]]) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for name in ops[waiting.pop()].outputs:
            for reader in consumers.get(name, ()):
                if reader not in found:
                    found.add(reader)
                    waiting.append(reader)
    return found


def _ancestors(end: int, ops: list[Op]) -> set[int]:
    producers = {name: i for i, op in enumerate(ops) for name in op.outputs}
    found, waiting = {end}, [end]
    while waiting:
        for name in ops[waiting.pop()].inputs:
            producer = producers.get(name)
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _feeders(region: set[int], ops: list[Op], values: dict[str, Value], consumers: dict[str, list[int]]) -> set[int]:
    """Ops before the region that read at most parameters and are read by the region alone."""
    producers = {name: i for i, op in enumerate(ops) for name in op.outputs}
    found: set[int] = set()
    for i in sorted(region, reverse=True):
        for name in ops[i].inputs:
            feeder = producers.get(name)
            if feeder is None or feeder in region or ops[feeder].mutates:
                continue
            reads = all(values[n].origin == "parameter" for n in ops[feeder].inputs)
            readers = {r for n in ops[feeder].outputs for r in consumers.get(n, ())}
            if reads and readers <= region:
                found.add(feeder)
    return found


def _region_op(members: list[Op], values: dict[str, Value]) -> Op:
    """One op for all members; `token_counts` in its kwargs are the sizes that grow with the number of tokens."""
    exit_op = members[-1]
    inner = {name for op in members for name in op.outputs}
    inputs = tuple(dict.fromkeys(name for op in members for name in op.inputs if name not in inner))
    (sort,) = [op for op in members if op.target in SORTS][:1]
    pairs = values[sort.inputs[0]].meta.shape[0]
    activations = [n for n in inputs if values[n].origin != "parameter" and values[n].meta.shape]
    counts = sorted({values[n].meta.shape[0] for n in activations} | {pairs}, reverse=True)
    outer = {*inputs, *exit_op.outputs}
    outer_roots = {values[name].root for name in outer}
    saved = [name for op in members for name in op.saved]
    shown = tuple(name for name in dict.fromkeys(_outer_name(n, outer, values) for n in saved) if name is not None)
    hidden = sum(values[values[n].root].meta.num_bytes for n in saved if values[n].root not in outer_roots)
    args: tuple[Arg, ...] = tuple(Ref(i) for i in range(len(inputs)))
    return replace(
        exit_op,
        target=REGION,
        inputs=inputs,
        args=args,
        kwargs={"token_counts": tuple(counts)},
        members=tuple(members),
        flops_forward=sum(op.flops_forward for op in members),
        flops_backward=sum(op.flops_backward for op in members),
        saved=shown,
        saved_extra_bytes=hidden + sum(op.saved_extra_bytes for op in members),
    )


def _outer_name(name: str, outer: set[str], values: dict[str, Value]) -> str | None:
    """The region's own input or output with the storage of `name`, if it has one."""
    root = values[name].root
    return next((n for n in sorted(outer) if values[n].root == root), None)
