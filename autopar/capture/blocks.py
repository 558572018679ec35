"""Blocks: contiguous groups of ops between which a pipeline may be cut, from the module structure.

A container is a module path under which at least two children are numbered (`model.layers.3`). Its children are
blocks; what stands outside of every container (embedding, head and loss) forms blocks of its own. Of nested
containers the outermost is taken unless its children differ in structure while an inner container's repeat, as in
ResNet, whose four stages differ but hold repeated residual layers. Runs of ops without any weight (a matrix or
convolution, an embedding) are joined to the block before them.

A model without containers is cut at narrow waists, where exactly one differentiable activation crosses, into at
most MAX_WAIST_BLOCKS blocks of about equal FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autopar.capture.classes import class_ids
from autopar.ir.graph import Block, Op, Value

MAX_WAIST_BLOCKS = 16


@dataclass(frozen=True)
class _Run:
    """Indices of consecutive non-shared ops with one key; the key is the block's module path or ""."""

    key: str
    indices: tuple[int, ...]


def assign_blocks(
    ops: list[Op], values: Mapping[str, Value], scopes: Mapping[str, str]
) -> tuple[tuple[Op, ...], tuple[Block, ...]]:
    """Ops with `block` set, and the blocks.

    Args:
        scopes: module path of each op, with `@n` marks for repeated calls of one module.
    """
    keys = block_keys([scopes[op.name] for op in ops if not op.is_shared],
                      [_signature(op, values) for op in ops if not op.is_shared])  # fmt: skip
    runs = _merge_light(_runs(ops, keys), ops, values)
    if len(runs) < 2:
        runs = _waist_runs(ops, values)
    members = [[ops[i] for i in run.indices] for run in runs]
    ids = class_ids(members, values, [op for op in ops if op.is_shared])
    blocks = tuple(
        Block(index, run.key or f"block{index}", run.indices[0], run.indices[-1] + 1, class_id)
        for index, (run, class_id) in enumerate(zip(runs, ids, strict=True))
    )
    block_of = {i: index for index, run in enumerate(runs) for i in run.indices}
    return tuple(replace(op, block=block_of.get(i, -1)) for i, op in enumerate(ops)), blocks


def _signature(op: Op, values: Mapping[str, Value]) -> tuple[object, ...]:
    return (op.target, tuple(values[name].meta.shape for name in (*op.inputs, *op.outputs)))


@dataclass
class _Node:
    """Module tree with the signatures of the ops under each node."""

    children: dict[str, _Node]
    signature: list[tuple[object, ...]]

    def numbered(self) -> dict[str, _Node]:
        return {name: child for name, child in self.children.items() if name.partition("@")[0].isdecimal()}


def block_keys(scopes: list[str], signatures: list[tuple[object, ...]]) -> list[str]:
    """For each op the path of the block's module, or "" outside of containers."""
    root = _Node({}, [])
    for scope, signature in zip(scopes, signatures, strict=True):
        node = root
        for part in scope.split(".") if scope else ():
            node = node.children.setdefault(part, _Node({}, []))
            node.signature.append(signature)
    prefixes: set[tuple[str, ...]] = set()
    _collect(root, (), prefixes)
    return [_key_of(scope, prefixes) for scope in scopes]


def _collect(node: _Node, path: tuple[str, ...], prefixes: set[tuple[str, ...]]) -> None:
    """Add the paths of the blocks under `node`."""
    numbered = node.numbered()
    is_container = len(numbered) >= 2
    is_uniform = is_container and _mostly_repeat(numbered)
    for name, child in node.children.items():
        here = (*path, name)
        if is_container and name in numbered:
            inner: set[tuple[str, ...]] = set()
            if not is_uniform:
                _collect(child, here, inner)
                inner = inner if _has_repeats(child) else set()
            prefixes.update(inner or {here})
        else:
            _collect(child, here, prefixes)


def _mostly_repeat(children: Mapping[str, _Node]) -> bool:
    """At least half of the children, and two, are alike."""
    counts = Counter(tuple(child.signature) for child in children.values())
    most = max(counts.values())
    return most >= 2 and 2 * most >= len(children)


def _has_repeats(node: _Node) -> bool:
    numbered = node.numbered()
    if len(numbered) >= 2 and _mostly_repeat(numbered):
        return True
    return any(_has_repeats(child) for child in node.children.values())


def _key_of(scope: str, prefixes: set[tuple[str, ...]]) -> str:
    parts = tuple(scope.split("."))
    return next((".".join(parts[:n]) for n in range(1, len(parts) + 1) if parts[:n] in prefixes), "")


def _runs(ops: list[Op], keys: list[str]) -> list[_Run]:
    indices = [i for i, op in enumerate(ops) if not op.is_shared]
    runs: list[_Run] = []
    for i, key in zip(indices, keys, strict=True):
        if runs and runs[-1].key == key:
            runs[-1] = _Run(key, (*runs[-1].indices, i))
        else:
            runs.append(_Run(key, (i,)))
    return runs


def _merge_light(runs: list[_Run], ops: list[Op], values: Mapping[str, Value]) -> list[_Run]:
    """Join runs without a weight of two dims to the run before; the first to the one after."""
    merged: list[_Run] = []
    for run in runs:
        is_light = not any(_is_heavy(ops[i], values) for i in run.indices)
        first_is_light = len(merged) == 1 and not any(_is_heavy(ops[i], values) for i in merged[0].indices)
        if merged and (is_light or first_is_light):
            key = merged[-1].key or run.key
            merged[-1] = _Run(key, (*merged[-1].indices, *run.indices))
        else:
            merged.append(run)
    return merged


def _is_heavy(op: Op, values: Mapping[str, Value]) -> bool:
    return any(values[name].origin == "parameter" and len(values[name].meta.shape) >= 2 for name in op.inputs)


def _waist_runs(ops: list[Op], values: Mapping[str, Value]) -> list[_Run]:
    """Equal-FLOP runs that end where one differentiable activation is alive."""
    indices = [i for i, op in enumerate(ops) if not op.is_shared]
    waists = _waists(indices, ops, values)
    total = sum(ops[i].flops_forward for i in indices)
    runs: list[_Run] = []
    heavy = {i for i in indices if _is_heavy(ops[i], values)}
    last_heavy = max(heavy, default=-1)
    current: list[int] = []
    has_weight = False
    flops = 0
    for i in indices:
        current.append(i)
        flops += ops[i].flops_forward
        target = total * (len(runs) + 1) / MAX_WAIST_BLOCKS
        has_weight = has_weight or i in heavy
        if i in waists and flops >= target and has_weight and i < last_heavy and len(runs) < MAX_WAIST_BLOCKS - 1:
            runs.append(_Run("", tuple(current)))
            current, has_weight = [], False
    return [*runs, _Run("", tuple(current))] if current else runs


def _waists(indices: list[int], ops: list[Op], values: Mapping[str, Value]) -> set[int]:
    """Op indices after which exactly one differentiable activation is still to be read."""
    last_read = {name: i for i in indices for name in ops[i].inputs}
    alive: set[str] = set()
    waists = set()
    for i in indices:
        alive.update(n for n in ops[i].outputs if values[n].requires_grad)
        alive = {name for name in alive if last_read.get(name, -1) > i}
        if len(alive) == 1:
            waists.add(i)
    return waists
