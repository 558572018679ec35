"""Fusion: which ops of a graph are written as one kernel, and what is left of their memory traffic.

`fused`: neighbouring pointwise ops, as fused kernels written by hand hold them; a softmax with what is done to its
operand; a norm that a module writes out in small ops. `compiled`: those, norms, reductions, softmax and loss with
their neighbours on both sides, as a compiler fuses them. Views in between disappear.

A group is a connected part of one block's ops of which no path leaves and comes back: ops carry the number of kernel
borders on the longest path to them, and only neighbours of the same number join. Inside a group nothing is written
or read but what enters and what leaves; one op carries the launch. Backward reads the gradients of what leaves and, if
any member's derivative needs values, what entered, from which inner values are computed again; it writes the gradients
of what entered. Kept are the sources of inner values instead of those that autograd would keep, where that is less.

Groups are facts of the graph, whatever is sharded how: a redistribution that falls between members is priced as such,
while the group's traffic stays that of one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.cost.kernels import NORMS, is_view
from autopar.cost.moves import LINEAR, LOSSES, PRODUCTS, REDUCTIONS, SOFTMAXES, Moves, Readers, eager_moves, run_by
from autopar.ir.graph import Op, OpGraph
from autopar.ir.software import Software
from autopar.rules.table import packet

POINTWISE = frozenset(
    (
        "add", "sub", "rsub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "log", "tanh", "sigmoid", "silu",
        "gelu", "relu", "leaky_relu", "elu", "hardtanh", "hardswish", "hardsigmoid", "softplus", "erf", "abs", "cos",
        "sin", "where", "masked_fill", "dropout", "native_dropout", "clamp", "clamp_min", "maximum", "minimum", "to",
        "_to_copy", "type_as", "cat", "stack", "reciprocal", "square", "addcmul",
    )
)  # fmt: skip
COPIES = frozenset(("clone", "contiguous"))

CASTS = frozenset(("to", "_to_copy", "type_as"))


@dataclass(frozen=True)
class Fusion:
    """Moves of ops by name, and what fusion did.

    Attributes:
        graph: as captured, but with what fused kernels keep for backward.
        moves: by op.
        groups, inner_values: the ops of each fused kernel, and what exists inside them alone, in the first block of
            each class.
    """

    graph: OpGraph
    moves: Mapping[str, Moves]
    groups: tuple[tuple[str, ...], ...]
    inner_values: frozenset[str]


def make_fusion(graph: OpGraph, software: Software, ops: Sequence[Op]) -> Fusion:
    """Moves of `ops`, which stand in the first block of their class or in none, in the hands of `software`."""
    kind = software.fusion
    readers = Readers(graph.ops, graph.values, adds_inside=kind == "compiled")
    moves = {op.name: run_by(software, op, graph.values, eager_moves(op, readers)) for op in ops}
    found, inner = [], set[str]()
    for block in dict.fromkeys(op.block for op in ops if op.block >= 0):
        own = graph.blocks[block]
        inside = [op for op in graph.ops[own.start : own.stop] if not op.is_shared]
        for group, is_compiled in _groups(graph, readers, inside, software):
            kernel = _Kernel(graph, readers, group, is_compiled)
            if len(kernel.working) == 1 and _name(kernel.working[0]) not in LOSSES:
                continue
            fused = kernel.moves(moves)
            moves |= {name: one for name, one in fused.items() if name in moves}
            found.append(tuple(op.name for op in group))
            inner |= kernel.inner
    if not found:
        return Fusion(graph, moves, (), frozenset())
    return Fusion(_keeping(graph, moves), moves, tuple(found), frozenset(inner))


def _groups(
    graph: OpGraph, readers: Readers, ops: Sequence[Op], software: Software
) -> Iterator[tuple[Sequence[Op], bool]]:
    """Groups of a block with whether a compiler makes them, or a kernel as good as what it makes."""
    is_compiled, rest = software.fusion == "compiled", ops
    if software.fuses_loss and not is_compiled:
        head = _loss_group(graph, ops)
        rest = [op for op in ops if op not in head]
        if head:
            yield head, True
    if software.fusion != "eager":
        maker = _Groups(graph, readers, is_compiled, software.compiles_loss)
        yield from ((group, is_compiled) for group in maker.groups(rest))


def _loss_group(graph: OpGraph, ops: Sequence[Op]) -> list[Op]:
    """The loss and the casts of its operands."""
    losses = [op for op in ops if _name(op) in LOSSES]
    read = {name for op in losses for name in op.inputs}
    casts = [op for op in ops if _name(op) in CASTS and read & set(op.outputs) and not is_view(op, graph.values)]
    return [*casts, *losses]


def _keeping(graph: OpGraph, moves: Mapping[str, Moves]) -> OpGraph:
    """The graph whose ops keep what their moves say."""
    ops = [
        replace(op, saved=moves[op.name].saved, saved_extra_bytes=moves[op.name].extra_bytes)
        if op.name in moves else op for op in graph.ops
    ]  # fmt: skip
    return replace(graph, ops=tuple(ops))


class _Groups:
    """Finds the groups of blocks."""

    def __init__(self, graph: OpGraph, readers: Readers, is_compiled: bool, with_loss: bool) -> None:
        self.graph, self.readers, self.is_compiled, self.with_loss = graph, readers, is_compiled, with_loss

    def groups(self, ops: Sequence[Op]) -> Iterator[list[Op]]:
        """Groups with at least one op that is no view, in order of their first ops."""
        modules = {op.module_path for op in ops if op.module_path and _name(op) in REDUCTIONS}
        producer = {name: op for op in ops for name in op.outputs}
        joins = {op.name for op in ops if self._can_join(op, modules)}
        level: dict[str, int] = {}
        leader: dict[str, str] = {}

        def find(name: str) -> str:
            while leader[name] != name:
                leader[name] = leader[leader[name]]
                name = leader[name]
            return name

        for op in ops:
            near = [(producer[v], self._joined(producer[v], op, joins, modules)) for v in op.inputs if v in producer]
            level[op.name] = max((level[other.name] + (not is_one) for other, is_one in near), default=0)
            leader[op.name] = op.name
            for other, is_one in near:
                if is_one and level[other.name] == level[op.name]:
                    leader[find(other.name)] = find(op.name)
        members: dict[str, list[Op]] = {}
        for op in ops:
            if op.name in joins:
                members.setdefault(find(op.name), []).append(op)
        yield from (g for g in members.values() if not all(is_view(op, self.graph.values) for op in g))

    def _can_join(self, op: Op, modules: set[str]) -> bool:
        name = _name(op)
        if is_view(op, self.graph.values) or name in POINTWISE or name in SOFTMAXES:
            return True
        if name in REDUCTIONS:
            return self.is_compiled or op.module_path in modules
        return self.is_compiled and (name in NORMS or (name in LOSSES and self.with_loss) or name in COPIES)

    def _joined(self, first: Op, then: Op, joins: set[str], modules: set[str]) -> bool:
        """Whether a value handed from one op to the next may stay inside a kernel."""
        if first.name not in joins or then.name not in joins:
            return False
        if self.is_compiled:
            return True
        own = first.module_path if first.module_path in modules else None
        other = then.module_path if then.module_path in modules else None
        return own == other and _name(first) not in SOFTMAXES


class _Kernel:
    """One group: `working` are its ops that are no views."""

    def __init__(self, graph: OpGraph, readers: Readers, group: Sequence[Op], is_compiled: bool) -> None:
        self.graph, self.values, self.readers, self.group = graph, graph.values, readers, group
        self.is_compiled = is_compiled
        self.working = [op for op in group if not is_view(op, self.values)]
        self.made = {name: op for op in group for name in op.outputs}
        self.views = {op.name for op in group} - {op.name for op in self.working}
        self.names = names = {op.name for op in group}
        leaving = [
            name for name in self.made
            if name in graph.results or any(op.name not in names for op, _ in readers.readers.get(name, ()))
        ]  # fmt: skip
        self.leaving = {self._base(name) for name in leaving} & self.made.keys()
        self.inner = {name for op in self.working for name in op.outputs} - self.leaving
        self.entering = self._entering()

    def _base(self, name: str) -> str:
        """What a view inside the group is a view of."""
        while name in self.made and self.made[name].name in self.views:
            name = self.made[name].inputs[0]
        return name

    def _entering(self) -> dict[str, set[int]]:
        """Operands, by op, through which the group reads what enters: each storage once, the largest parts first."""
        found: dict[str, list[tuple[int, str, str, int]]] = {}
        for op in self.working:
            for slot, name in enumerate(op.inputs):
                base = self._base(name)
                if base not in self.made:
                    size = self.values[name].meta.num_bytes
                    found.setdefault(self.values[base].root, []).append((-size, name, op.name, slot))
        chosen: dict[str, set[int]] = {}
        for root, reads in found.items():
            left, seen = self.values[root].meta.num_bytes, set[str]()
            for size, name, reader, slot in sorted(reads):
                if left > 0 and name not in seen:
                    chosen.setdefault(reader, set()).add(slot)
                    seen.add(name)
                    left += size
        return chosen

    def moves(self, eager: Mapping[str, Moves]) -> dict[str, Moves]:
        """Moves of every op of the group."""
        curved = [op for op in self.working if not self._is_linear(op)]
        sources = {base for op in curved for v in op.inputs for base in self._sources(v)}
        wanted = [self.values[v] for op in self.working for v in op.inputs if self.values[v].requires_grad]
        sums = float(any(value.origin == "parameter" for value in wanted))
        runs = any(self.values[v].requires_grad for v in self.leaving)
        saved, extra = self._saved()
        found: dict[str, Moves] = {}
        for op in self.group:
            is_first = op is self.working[0]
            forward, backward, gradients = self._operands(op, sources, sums)
            kept = [float(v in self.leaving and op.name not in self.views) for v in op.outputs]
            back = [
                (1.0 + sums) * float(self.values[v].requires_grad) * k for v, k in zip(op.outputs, kept, strict=True)
            ]
            old = eager.get(op.name)
            found[op.name] = Moves(
                (*forward, *kept), (*backward, *back), (*(0.0 for _ in op.inputs), *kept),
                (*gradients, *(0.0 for _ in op.outputs)),
                forward_kernels=float(is_first), backward_kernels=(1.0 + sums) * float(is_first and runs),
                inner_passes=(0.0, 0.0), works=len(self.working) == 1,
                saved=saved.get(op.name, ()), extra_bytes=extra.get(op.name, op.saved_extra_bytes),
                accumulated=((), ()) if old is None else old.accumulated,
            )  # fmt: skip
        return found

    def _operands(self, op: Op, sources: set[str], sums: float) -> tuple[list[float], list[float], list[float]]:
        """Per operand: reads of forward, moves of backward, whether its gradient leaves the group.

        Both operands of an addition share one gradient.
        """
        chosen = self.entering.get(op.name, set())
        forward = [float(slot in chosen) for slot in range(len(op.inputs))]
        gradients = [f * float(self.values[v].requires_grad) for f, v in zip(forward, op.inputs, strict=True)]
        backward, shapes = [], list[tuple[int, ...]]()
        for name, reads, need in zip(op.inputs, forward, gradients, strict=True):
            base, shape = self._base(name), self.values[name].meta.shape
            first = self.readers.first(base) if need else None
            adds = self.readers.adding * float(first is not None and first[0] not in self.names)
            writes = need * float(_name(op) not in ("add", "sub") or shape not in shapes)
            shapes += [shape] if need else []
            backward.append(reads * float(base in sources) * (1.0 + sums * need) + writes + adds)
        return forward, backward, gradients

    def _is_linear(self, op: Op) -> bool:
        name = _name(op)
        if name in PRODUCTS:
            return len(op.inputs) == 1
        return name in LINEAR

    def _saved(self) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
        """Values kept because of each op, and its extra bytes, where keeping the sources of inner values is less."""
        plain = {op.name: op.saved for op in self.group}
        extra = {op.name: 0 for op in self.working if self.is_compiled and _name(op) in LOSSES}
        dropped = [v for op in self.group for v in op.saved if self._base(v) in self.inner]
        if not dropped and not extra:
            return plain, {}
        starts = [*dropped, *(next(op for op in self.working if op.name == name).inputs[0] for name in extra)]
        sources = dict.fromkeys(source for name in starts for source in self._sources(name))
        new = [s for s in sources if self._is_new(s)]
        before = sum(self.values[self.values[v].root].meta.num_bytes for v in dropped)
        before += sum(op.saved_extra_bytes for op in self.working if op.name in extra)
        if sum(self.values[self.values[s].root].meta.num_bytes for s in new) > before:
            return plain, {}
        saved = {name: [v for v in names if v not in dropped] for name, names in plain.items()}
        self.readers.kept.update(self.values[s].root for s in new)
        for source in new:
            holder = next(op for op in self.group if source in op.inputs or source in op.outputs)
            saved[holder.name].append(source)
        return {name: tuple(names) for name, names in saved.items()}, extra

    def _sources(self, name: str) -> Iterator[str]:
        """Values in memory from which an inner value can be computed again."""
        pending, seen = [self._base(name)], set[str]()
        while pending:
            base = pending.pop()
            if base in seen:
                continue
            seen.add(base)
            if base in self.inner:
                pending += [self._base(v) for v in self.made[base].inputs]
            else:
                yield base

    def _is_new(self, source: str) -> bool:
        """Whether a source is kept by nothing else."""
        root = self.values[source].root
        return self.values[root].origin == "op" and root not in self.readers.kept


def _name(op: Op) -> str:
    """Name of the op, in place or not."""
    return packet(op.target).rstrip("_")
