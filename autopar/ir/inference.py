"""Inference plans: how a plan says that it runs forward alone, and the rates that follow from its figures.

The mode is an option of the model beside those of `--set`, since it decides what is captured: everything that builds
the plan's model again gets it with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.errors import InputError
from autopar.ir.graph import OpGraph, Value
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.software import PRECISION_OPTION

MODE_OPTION = "autopar:mode"
"""Option that a model is captured with for inference; absent for training."""
TRAINING, INFERENCE = "training", "inference"
MODES = (TRAINING, INFERENCE)


def source_options(mode: str, precision: str | None) -> dict[str, str]:
    """Options that say how a model is run, beside its own. Raises InputError for a mode that is none, or a precision
    beside inference.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == INFERENCE and precision is not None:
        raise InputError("a precision is for training: build the model in the dtype to infer in, e.g. --set dtype=...")
    if mode == INFERENCE:
        return {MODE_OPTION: mode}
    return {} if precision is None else {PRECISION_OPTION: precision}


def is_inference(plan: Plan) -> bool:
    """The plan runs forward alone."""
    return plan.model.options.get(MODE_OPTION) == INFERENCE


def require_training(plan: Plan, command: str) -> None:
    """Raises InputError for a plan of inference, which `command` has no use for."""
    if is_inference(plan):
        raise InputError(f"{command} is for plans that train, and this one is for inference (--mode inference)")


def read_inputs(graph: OpGraph) -> tuple[Value, ...]:
    """Batch inputs that some op reads, in graph order."""
    read = {name for op in graph.ops for name in op.inputs}
    return tuple(value for value in graph.outside("input") if value.name in read)


def cache_bytes(graph: OpGraph) -> int:
    """Bytes of the batch inputs that are kept split where they are read, if any: numbers beside indices."""
    inputs = read_inputs(graph)
    has_indices = any(not value.meta.is_floating for value in inputs)
    return sum(value.meta.num_bytes for value in inputs if value.meta.is_floating) if has_indices else 0


def tokens_per_sample(graph: OpGraph) -> int:
    """Length of the first batch input that is a sequence of indices; 0 if there is none."""
    for value in read_inputs(graph):
        if value.batch_dim == 0 and len(value.meta.shape) == 2 and not value.meta.is_floating:
            return value.meta.shape[1]
    return 0


@dataclass(frozen=True)
class Rates:
    """What a step's figures mean for inference; per token is None where samples are no sequences of indices.

    Attributes:
        latency_s: of one batch, from its arrival on all devices to its last output.
        samples_per_s: where each batch starts when the one before is done.
        full_samples_per_s: where the first stage takes the next batch as soon as it is free.
        j_per_sample: where each batch starts when the one before is done.
    """

    latency_s: Quantity
    samples_per_s: Quantity
    full_samples_per_s: Quantity
    tokens_per_s: Quantity | None
    j_per_sample: Quantity
    j_per_token: Quantity | None


def rates_of(plan: Plan) -> Rates:
    """Rates of a plan for inference."""
    predicted, batch, tokens = plan.predicted, plan.model.batch_size, plan.tokens_per_sample
    busiest = max((stage.forward_s for stage in predicted.stages), key=lambda forward: forward.value)
    own = _times(busiest, plan.decisions.num_microbatches, "s")
    step = predicted.step_time_s
    full = own if own.value < step.value and not plan.decisions.pace_s else step
    return Rates(
        latency_s=step,
        samples_per_s=per_second(batch, step, "samples/s"),
        full_samples_per_s=per_second(batch, full, "samples/s"),
        tokens_per_s=per_second(batch * tokens, step, "tokens/s") if tokens else None,
        j_per_sample=_times(predicted.energy_j, 1 / batch, "J"),
        j_per_token=_times(predicted.energy_j, 1 / (batch * tokens), "J") if tokens else None,
    )


def per_second(count: int, time: Quantity, unit: str) -> Quantity:
    """So many things in that time."""
    return Quantity(count / time.value, unit, time.label, count / time.high, count / time.low)


def _times(quantity: Quantity, factor: float, unit: str) -> Quantity:
    low, value, high = (factor * figure for figure in (quantity.low, quantity.value, quantity.high))
    return Quantity(value, unit, quantity.label, low, high)
