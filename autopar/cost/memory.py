"""Bytes and traffic of parameters: weights, gradients, optimizer state, and the once-a-step update.

AdamW keeps two states in the parameter's dtype (torch semantics: no fp32 master copy), SGD without momentum none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autopar.errors import InputError
from autopar.ir.graph import Value
from autopar.ir.placement import Sharding
from autopar.ir.strategy import ParameterStrategy, optimizer_sharding, storage_sharding

STATES_BY_OPTIMIZER: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "none": 0}

BUCKET_BYTES = 25 * 2**20
"""Gradients are synchronised in buckets of this size, so a small parameter pays its share of one collective's
latency. Source: default of torch's DistributedDataParallel."""


def optimizer_states(optimizer: str) -> int:
    """State tensors per parameter.

    Raises:
        InputError: for an unknown optimizer.
    """
    if optimizer not in STATES_BY_OPTIMIZER:
        raise InputError(f"unknown optimizer {optimizer!r}; known: {', '.join(sorted(STATES_BY_OPTIMIZER))}")
    return STATES_BY_OPTIMIZER[optimizer]


def update_passes(optimizer: str) -> int:
    """Passes over a parameter's bytes in one update: read it, its gradient and states; write it and its states."""
    return 3 + 2 * optimizer_states(optimizer)


def parameter_bytes(
    value: Value, strategy: ParameterStrategy, axis_sizes: Sequence[int], states: int
) -> tuple[float, float, float]:
    """Bytes of a parameter, its gradient and its optimizer state on one device.

    The gradient lies where the parameter does (zero1 gathers no gradient, but holds the whole one until the step).
    """

    def local(sharding: Sharding) -> float:
        cut = math.prod(size for p, size in zip(sharding, axis_sizes, strict=True) if p.is_shard)
        return value.meta.num_bytes / cut

    stored = local(storage_sharding(strategy))
    if not value.requires_grad:
        return stored, 0.0, 0.0
    return stored, stored, states * local(optimizer_sharding(strategy))
