"""Which products of a stage can leave the gradient of their weight for later (zero-bubble schedules).

A product x W has two halves of backward: the gradient of x, which the stage before waits for, and that of W, for which
nobody waits before the end of the step (Qi et al. 2024, "Zero Bubble Pipeline Parallelism"). The second half can wait
where it leads to a parameter that nothing else of the stage reads, so that its gradient comes from one place. It goes
with the first half where x needs no gradient, and where the parameter is gathered for use (ZeRO-3): its gradient
leaves with those of its neighbours then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from autopar.ir.graph import Op
from autopar.ir.strategy import ParameterStrategy
from autopar.rules.call import Values
from autopar.rules.table import packet

WEIGHT_SLOTS: Mapping[str, tuple[int, int]] = {"linear": (0, 1), "mm": (0, 1), "matmul": (0, 1), "addmm": (1, 2)}
"""Where x and W stand among the operands of a product."""
FORMS = frozenset(("to", "_to_copy", "t", "transpose"))
"""Ops of one operand that may stand between a parameter and its product."""


def delayed_products(ops: Sequence[Op], values: Values, parameters: Mapping[str, ParameterStrategy]) -> frozenset[str]:
    """Names of the ops whose weight gradients can wait.

    Args:
        ops: all of one stage.
        values: of the graph.
        parameters: how each is stored, by name.
    """
    reads = Counter(name for op in ops for name in op.inputs)
    makers = {name: op for op in ops for name in op.outputs}
    found = []
    for op in ops:
        weight = _weight(op, values, makers, reads)
        if weight is not None and not _is_gathered(parameters.get(weight, ())):
            found.append(op.name)
    return frozenset(found)


def weight_slots(op: Op, values: Values) -> tuple[int, int] | None:
    """Where x and W stand among the operands of a product whose x needs a gradient; None for any other op."""
    slots = WEIGHT_SLOTS.get(packet(op.target))
    if slots is None or op.members or op.kwargs or len(op.inputs) <= slots[1] or len(op.outputs) != 1:
        return None
    x, weight = (values[op.inputs[slot]] for slot in slots)
    is_product = len(x.meta.shape) >= 2 and len(weight.meta.shape) == 2 and x.requires_grad and weight.requires_grad
    return slots if is_product and x.name != weight.name else None


def _weight(op: Op, values: Values, makers: Mapping[str, Op], reads: Counter[str]) -> str | None:
    """The parameter behind the product's weight, read for nothing else."""
    slots = weight_slots(op, values)
    if slots is None:
        return None
    name = op.inputs[slots[1]]
    while reads[name] == 1:
        if values[name].origin == "parameter":
            return name
        maker = makers.get(name)
        if maker is None or packet(maker.target) not in FORMS or len(maker.inputs) != 1:
            return None
        (name,) = maker.inputs
    return None


def _is_gathered(strategy: ParameterStrategy) -> bool:
    return any(axis.storage.is_shard and axis.storage != axis.exposed for axis in strategy)
