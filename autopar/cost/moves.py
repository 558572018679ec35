"""What the kernels of an op move, forward and backward, where every op is a kernel of its own (eager execution).

Counts are per operand and result of the op, in order of appearance, in units of that tensor's bytes. Backward is
counted from what autograd runs: a GEMM's two GEMMs, the reads of saved values, the sums over broadcast dims, the
zero-filled gradients behind slices, and the additions where several readers' gradients meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from autopar.cost.kernels import (
    CONVOLUTIONS,
    GROWING_VIEWS,
    HEADER_VIEWS,
    LOOKUPS,
    NORMS,
    SELECTING_VIEWS,
    is_view,
)
from autopar.ir.graph import Op, Value
from autopar.ir.software import Software
from autopar.rules.recompute import ATTENTIONS, GEMMS
from autopar.rules.table import packet

PASSING = frozenset(("add", "sub", "clone", "contiguous", "cat", "stack", "where", "masked_fill"))
"""Ops whose backward hands on the gradient, or a view of it, unless an operand was broadcast."""
LINEAR = PASSING | {"rsub", "neg", "to", "_to_copy", "type_as", "mean", "sum", "reshape", "flatten", "roll"}
"""Ops whose backward needs nothing that forward computed."""
FLOAT8, TF32 = "float8_e4m3fn", "tf32"
LOSSES = frozenset(("cross_entropy_loss", "nll_loss", "autopar.token_loss"))
PRODUCTS = frozenset(("mul", "div"))
SOFTMAXES = frozenset(("softmax", "_softmax", "log_softmax", "_log_softmax"))
REDUCTIONS = frozenset(("mean", "sum", "var", "var_mean", "amax"))


@dataclass(frozen=True, slots=True)
class Moves:
    """Memory traffic, launches and saved values of one op.

    Attributes:
        forward, backward: per operand and result, how often it is moved; the first mention of a tensor counts.
        written, gradients: 1 where a result, or the gradient of an operand, takes memory of its own, else 0; 2 for the
            operand of a loss, which has the gradient of its log-probabilities beside its own.
        forward_kernels, backward_kernels: launches.
        inner_passes: how often the values inside a region op are moved, forward and backward.
        works: whether its FLOPs take time of their own (not beside the memory traffic of a fused kernel).
        saved: values kept for backward because of this op.
        extra_bytes: kept beside graph values; written by forward and read by backward.
        apart: as forward and backward, but moved by kernels of their own, which no arithmetic hides.
        joined: what of `apart` in backward adds an operand's gradient to that of an earlier reader.
        accumulated: as backward, and apart, for adding a parameter's gradient to that of earlier microbatches.
        dtype: in which it computes, or "" for that of its operands.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    written: tuple[float, ...]
    gradients: tuple[float, ...]
    forward_kernels: float
    backward_kernels: float
    inner_passes: tuple[float, float]
    works: bool
    saved: tuple[str, ...]
    extra_bytes: int
    apart: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    joined: tuple[float, ...] = ()
    accumulated: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    dtype: str = ""


class Readers:
    """Who reads each value, and which storages are kept for backward.

    Attributes:
        readers: value -> (op, operand) in execution order.
        kept: storage roots that some op keeps.
        adding: memory traffic of adding a further gradient to one that is there: in a kernel of its own, reads two
            and writes one; as part of another kernel, reads one.
    """

    def __init__(self, ops: tuple[Op, ...], values: Mapping[str, Value], *, adds_inside: bool) -> None:
        self.values = values
        self.adding = 1.0 if adds_inside else 3.0
        self.adding_kernels = 0.0 if adds_inside else 1.0
        self.readers: dict[str, list[tuple[Op, int]]] = {}
        self.kept: set[str] = set()
        for op in ops:
            self.kept.update(values[name].root for name in op.saved)
            for slot, name in enumerate(op.inputs):
                self.readers.setdefault(name, []).append((op, slot))

    def first(self, name: str) -> tuple[str, int] | None:
        """Op and operand that hand back a value's first gradient; None where there is no gradient to add up.

        Gradients of parameters meet too, but in their buffers, whoever reads them.
        """
        value = self.values[name]
        if not value.requires_grad or value.origin == "parameter":
            return None
        trained = (
            (op.name, at) for op, at in self.readers[name] if any(self.values[v].requires_grad for v in op.outputs)
        )
        return next(trained, None)

    def is_further(self, op: Op, slot: int) -> bool:
        """Whether the gradient of this operand meets one that an earlier reader of the value receives."""
        first = self.first(op.inputs[slot])
        return first is not None and first != (op.name, slot)


def first_mentions(op: Op) -> tuple[bool, ...]:
    """Per operand and result: whether it is the first mention of that tensor among operands, or among results."""
    seen_in = [op.inputs.index(name) == slot for slot, name in enumerate(op.inputs)]
    return (*seen_in, *(op.outputs.index(name) == slot for slot, name in enumerate(op.outputs)))


def eager_moves(op: Op, readers: Readers) -> Moves:
    """Moves of an op that is a kernel of its own; without outputs that need gradients backward is not run at all."""
    values, first, num_inputs = readers.values, first_mentions(op), len(op.inputs)
    view, name = is_view(op, values), packet(op.target).rstrip("_")
    wanted = tuple(float(values[v].requires_grad and first[slot]) for slot, v in enumerate(op.inputs))
    forward = [float(seen and not view) for seen in first]
    if name in LOOKUPS:
        forward[0] = 0.0
    if name in NORMS:
        forward[0] = 2.0
    runs = any(values[v].requires_grad for v in op.outputs)
    backward, kernels = _backward(name, op, values, wanted) if runs else ([0.0] * len(first), 0.0)
    backward = [count if seen else 0.0 for count, seen in zip(backward, first, strict=True)]
    further = [float(runs and slot < num_inputs and readers.is_further(op, slot)) for slot in range(len(first))]
    apart = joined = [readers.adding * is_one for is_one in further]
    if name in GEMMS:
        by_bias = _bias_reads(name, op, wanted) * float(runs)
        backward = [own - by_bias * (slot >= num_inputs) for slot, own in enumerate(backward)]
        apart = [own + by_bias * (slot >= num_inputs) for slot, own in enumerate(apart)]
    return Moves(
        tuple(forward), tuple(backward),
        written=(*(0.0,) * num_inputs, *(float(seen) for seen in first[num_inputs:])),
        gradients=(*((1.0 + (name in LOSSES)) * need for need in wanted), *(0.0,) * len(op.outputs)),
        forward_kernels=0.0 if view else 1.0,
        backward_kernels=kernels + readers.adding_kernels * sum(further), inner_passes=(2.0, 4.0), works=True,
        saved=op.saved, extra_bytes=op.saved_extra_bytes, apart=((), tuple(apart)), joined=tuple(joined),
    )  # fmt: skip


def run_by(software: Software, op: Op, values: Mapping[str, Value], moves: Moves) -> Moves:
    """The same op where the software's gradients are added up over microbatches, and where it computes in 8 bits.

    Parameters that are gathered block by block hand their gradients back each time (`upkeep` adds those). A GEMM
    written to add to the gradient reads and writes that alone; otherwise the new gradient is read again, by a kernel of
    its own. Casts to 8 bits read operands and the result's gradient, and write them twice (as they are and transposed);
    GEMMs then read half as much.
    """
    name, num_inputs = packet(op.target), len(op.inputs)
    metas = [values[v].meta for v in (*op.inputs, *op.outputs)]
    trained = [values[v].origin == "parameter" and values[v].requires_grad for v in (*op.inputs, *op.outputs)]
    if software.tf32 and name in GEMMS and all(meta.dtype == "float32" for meta in metas if meta.is_floating):
        moves = replace(moves, dtype=TF32)
    if not any(trained):
        return moves
    if not software.prefetch_parameters:
        is_inside = software.fusion == "fused" and name in GEMMS
        items = [meta.num_bytes / max(meta.numel, 1) for meta in metas]
        times = [2.0 * (software.gradient_bytes or item) / item + 1.0 - 2.0 * is_inside for item in items]
        added = tuple(t * float(is_own) for t, is_own in zip(times, trained, strict=True))
        moves = replace(moves, accumulated=(added, ()) if is_inside else ((), added))
    is_half = all(meta.dtype in ("bfloat16", "float16") for meta in metas if meta.is_floating)
    if software.fp8 and name in ("linear", "mm", "addmm") and is_half:
        forward = tuple(own * (0.5 if slot < num_inputs else 1.0) for slot, own in enumerate(moves.forward))
        cast = tuple(2.0 * own * (slot < num_inputs) for slot, own in enumerate(moves.forward))
        more = moves.apart[1] or (0.0,) * len(metas)
        back = tuple(own + 2.0 * (slot >= num_inputs) for slot, own in enumerate(more))
        moves = replace(moves, forward=forward, apart=(cast, back), dtype=FLOAT8)
    return moves


def _backward(name: str, op: Op, values: Mapping[str, Value], wanted: tuple[float, ...]) -> tuple[list[float], float]:
    """Counts per operand and result, and launches; `wanted` is 1 for operands that need a gradient."""
    outs, some = len(op.outputs), sum(wanted)
    if name in HEADER_VIEWS:
        return [0.0] * (len(wanted) + outs), 0.0
    if name in GEMMS and name != "autopar.moe_experts":
        return _gemm(name, op, values, wanted)
    if name in PASSING:
        return _passing(op, values, wanted)
    for names, rule in _RULES:
        if name in names:
            inputs, results, kernels = rule(wanted)
            return [*inputs, *(results,) * outs], kernels
    if is_view(op, values):
        return [0.0] * (len(wanted) + outs), 0.0
    if name in GEMMS or name in CONVOLUTIONS or name in ATTENTIONS or op.members:
        return [*(1.0 + need for need in wanted), *(2.0,) * outs], max(some, 1.0)
    if name in PRODUCTS and len(op.inputs) > 1:
        return _product(op, values, wanted)
    reads = [float(name not in LINEAR | PRODUCTS and values[v].meta.is_floating) for v in op.inputs]
    return [*(need + read for need, read in zip(wanted, reads, strict=True)), *(1.0,) * outs], 1.0


BIASES = {"linear": 2, "addmm": 0, "baddbmm": 0}
"""Operand of a GEMM that is added."""


def _bias_reads(name: str, op: Op, wanted: tuple[float, ...]) -> float:
    """How often the result's gradient is read for that of the bias."""
    slot = BIASES.get(name, -1)
    return wanted[slot] if 0 <= slot < len(op.inputs) else 0.0


def _gemm(name: str, op: Op, values: Mapping[str, Value], wanted: tuple[float, ...]) -> tuple[list[float], float]:
    """Each wanted matrix is a GEMM that reads the result's gradient and the other matrix; a bias is a sum."""
    bias = BIASES.get(name, -1)
    matrices = [slot for slot in range(len(op.inputs)) if slot != bias and values[op.inputs[slot]].meta.is_floating]
    counts = list(wanted)
    for slot in matrices:
        counts[slot] += sum(wanted[other] for other in matrices if other != slot)
    return [*counts, *(sum(wanted),) * len(op.outputs)], sum(wanted)


def _passing(op: Op, values: Mapping[str, Value], wanted: tuple[float, ...]) -> tuple[list[float], float]:
    """A broadcast operand's gradient is a sum over what the result's gradient holds."""
    size = values[op.outputs[0]].meta.numel
    is_joined = packet(op.target) in ("cat", "stack")
    summed = [
        need * float(not is_joined and values[v].meta.numel < size) for need, v in zip(wanted, op.inputs, strict=True)
    ]
    return [*summed, *(sum(summed),) * len(op.outputs)], sum(summed)


def _product(op: Op, values: Mapping[str, Value], wanted: tuple[float, ...]) -> tuple[list[float], float]:
    """A broadcast operand's gradient is first written in full, then summed."""
    size, some = values[op.outputs[0]].meta.numel, sum(wanted)
    summed = sum(need for need, v in zip(wanted, op.inputs, strict=True) if values[v].meta.numel < size)
    counts = [need + min(1.0, some - need) for need in wanted]
    return [*counts, *(some + 2 * summed,) * len(op.outputs)], some + summed


_Rule = Callable[[tuple[float, ...]], tuple[list[float], float, float]]


def _selecting(wanted: tuple[float, ...]) -> tuple[list[float], float, float]:
    """Zeros for the whole, and the part copied in."""
    return list(wanted), 2.0, 2.0


def _joining(wanted: tuple[float, ...]) -> tuple[list[float], float, float]:
    """The result's gradient is read once."""
    return list(wanted), 1.0, 1.0


def _nothing(wanted: tuple[float, ...]) -> tuple[list[float], float, float]:
    """The gradient is small and expanded without a copy."""
    return [0.0 for _ in wanted], 0.0, 1.0


def _norm(wanted: tuple[float, ...]) -> tuple[list[float], float, float]:
    """One kernel for the operand's gradient, which reads rows twice, and one that sums over rows for the weights'."""
    by_weights = float(sum(wanted[1:]) > 0)
    times = 2.0 + by_weights
    return [times + need if slot == 0 else need for slot, need in enumerate(wanted)], times, 1.0 + by_weights


def _loss(wanted: tuple[float, ...]) -> tuple[list[float], float, float]:
    """A zero-filled gradient of the log-probabilities is written and read, that of the logits written."""
    return [3.0 * need for need in wanted], 1.0, 2.0


_RULES: tuple[tuple[frozenset[str], _Rule], ...] = (
    (frozenset(("split", "split_with_sizes", "chunk", "unbind")), _joining),
    (SELECTING_VIEWS, _selecting),
    (GROWING_VIEWS | LOOKUPS, _joining),
    (frozenset(("mean", "sum")), _nothing),
    (NORMS, _norm),
    (LOSSES, _loss),
    (frozenset(("dropout", "native_dropout")), _joining),
)
