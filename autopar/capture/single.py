"""The graph of one sample in the form that it has for several.

`contiguous` of a tensor that is contiguous already leaves no call behind, and a dim of size 1 makes many tensors so;
libraries skip `expand` where there is one sample. A graph may thus lack calls that it has at two samples or more, and
the ops after them have other names. A plan is made for the whole batch; to run it in microbatches of one sample, its
ops are looked up by name.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir.graph import Op, OpGraph, Ref

COPY = "aten.contiguous.default"
EXPAND = "aten.expand.default"
"""What may be missing at one sample, where it would do nothing."""


def as_for_several(single: OpGraph, several: OpGraph) -> OpGraph:
    """The ops and names of `several`, with the shapes and arguments of `single`.

    Where the two differ in more than idle calls, `single` as it is.

    Args:
        single: captured at one sample.
        several: the same model captured at more.
    """
    partners = _partners(single, several)
    if partners is None:
        return single
    same: dict[str, str] = {name: name for name in several.values if name in single.values}
    ops = []
    for op, partner in partners:
        if partner is None:
            same[op.outputs[0]] = same[op.inputs[0]]
            shape = single.values[same[op.inputs[0]]].meta.shape
            ops.append(replace(op, args=(Ref(0), shape)) if op.target == EXPAND else op)
        else:
            ops.append(_called_as(op, partner, same))
    values = {
        name: replace(value, meta=single.values[same[name]].meta) if name in same else value
        for name, value in several.values.items()
    }
    return replace(several, ops=tuple(ops), values=values, batch_size=single.batch_size)


def _partners(single: OpGraph, several: OpGraph) -> list[tuple[Op, Op | None]] | None:
    """Each op of `several` with that of `single` it corresponds to, None for one that is not there."""
    found: list[tuple[Op, Op | None]] = []
    aliases = {name: name for name in several.values}
    there: dict[str, str] = {}
    waiting = list(reversed(single.ops))
    for op in several.ops:
        wanted = [aliases[name] for name in op.inputs]
        partner = waiting[-1] if waiting else None
        if partner is not None and _is_same(op, partner) and [there.get(n, n) for n in partner.inputs] == wanted:
            waiting.pop()
            there |= dict(zip(partner.outputs, op.outputs, strict=True))
            found.append((op, partner))
        elif op.target in (COPY, EXPAND):
            aliases[op.outputs[0]] = wanted[0]
            found.append((op, None))
        else:
            return None
    return None if waiting else found


def _is_same(op: Op, other: Op) -> bool:
    """Whether two ops call the same in the same place."""
    places = (op.target, op.module_path, len(op.outputs), [member.target for member in op.members])
    return places == (other.target, other.module_path, len(other.outputs), [m.target for m in other.members])


def _called_as(op: Op, partner: Op, same: dict[str, str]) -> Op:
    """The op with its partner's arguments; notes whose shapes its results have."""
    same |= dict(zip(op.outputs, partner.outputs, strict=True))
    members = tuple(_called_as(mine, its, same) for mine, its in zip(op.members, partner.members, strict=True))
    return replace(op, args=partner.args, kwargs=partner.kwargs, members=members)
