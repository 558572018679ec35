"""Grouped queries: attention whose keys and values were repeated for it reads them unrepeated, with `enable_gqa`.

The repetition is `unsqueeze(2)`, `expand`, `reshape` of [b h s e] to [b h g s e] to [b h*g s e]: each head stands for g
consecutive query heads, which is what `enable_gqa` means. Unrepeated, keys and values are g times smaller to gather
where rows are split, and to keep for backward. But they are also fewer to split over ranks: where a node's GPUs could
not share them evenly, the repetition stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.capture.saved import ATTENTION
from autopar.ir.graph import Op, Value

NODE_RANKS = 8
"""Heads are split over the GPUs of a node at most, as all tensor parallelism; nodes have up to so many."""


def group_queries(ops: list[Op], values: Mapping[str, Value]) -> list[Op]:
    """Attention over unrepeated keys and values; the repeating ops stay, dead unless something else reads them."""
    producers = {name: op for op in ops for name in op.outputs}
    return [_grouped(op, values, producers) if op.target == ATTENTION else op for op in ops]


def _grouped(op: Op, values: Mapping[str, Value], producers: Mapping[str, Op]) -> Op:
    chains = [_repetition(name, values, producers) for name in op.inputs[1:3]]
    if op.kwargs.get("enable_gqa") or None in chains or len(op.args) > 6:
        return op
    key, value = (chain for chain in chains if chain is not None)
    if values[key[0]].meta.shape[1] != values[value[0]].meta.shape[1]:
        return op
    renamed = {made: chain[0] for chain in (key, value) for made in chain[1:]}
    return replace(
        op,
        inputs=(op.inputs[0], key[0], value[0], *op.inputs[3:]),
        kwargs={**op.kwargs, "enable_gqa": True},
        saved=tuple(dict.fromkeys(renamed.get(name, name) for name in op.saved)),
    )


def _repetition(name: str, values: Mapping[str, Value], producers: Mapping[str, Op]) -> tuple[str, ...] | None:
    """(heads, unsqueezed, expanded, repeated), or None if `name` is no repetition of heads."""
    chain = [name]
    for target in ("aten.reshape.default", "aten.expand.default", "aten.unsqueeze.default"):
        op = producers.get(chain[0])
        if op is None or op.target != target:
            return None
        chain.insert(0, op.inputs[0])
    heads, _, expanded, repeated = (values[n].meta.shape for n in chain)
    if len(heads) != 4 or len(expanded) != 5:
        return None
    batch, count, length, size = heads
    groups = expanded[2]
    fits = (
        count % NODE_RANKS == 0
        and expanded == (batch, count, groups, length, size)
        and repeated == (batch, count * groups, length, size)
    )
    return tuple(chain) if fits and groups > 1 else None
