"""Bytes and traffic of parameters: weights, gradients, optimizer state, and the once-a-step update.

AdamW keeps two states, SGD without momentum none; in which precision, and whether beside a master copy, is a fact of
the software. autopar's own runtime follows torch: states in the parameter's dtype, no master copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.errors import InputError
from autopar.ir.graph import OpGraph, Value
from autopar.ir.placement import Sharding
from autopar.ir.software import Software
from autopar.ir.strategy import ParameterStrategy, optimizer_sharding, storage_sharding
from autopar.ir.tensor import BYTES_BY_DTYPE

STATES_BY_OPTIMIZER: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "none": 0}

BUCKET_BYTES = 25 * 2**20
"""Gradients are synchronised in buckets of this size, so a small parameter pays its share of one collective's
latency. Source: default of torch's DistributedDataParallel."""


ALLOCATOR_SLACK = 0.18
"""What torch's caching allocator takes from the device beyond what is in use, relative to what moves (activations,
workspaces, gathered parameters): blocks of one size that no other size can use, and splits. Source: fitted to reserved
peaks that torchtitan publishes for Llama 3.1 8B on eight H100 (16 % with compiled layers, 25 % without)."""


def slack_share(software: Software, unseen_share: float = 0.0) -> float:
    """Slack in what the software's meter shows, relative to what moves; `unseen_share` is that of bytes handed out."""
    return ALLOCATOR_SLACK if software.meter == "reserved" else unseen_share


def optimizer_states(optimizer: str) -> int:
    """State tensors per parameter.

    Raises:
        InputError: for an unknown optimizer.
    """
    if optimizer not in STATES_BY_OPTIMIZER:
        raise InputError(f"unknown optimizer {optimizer!r}; known: {', '.join(sorted(STATES_BY_OPTIMIZER))}")
    return STATES_BY_OPTIMIZER[optimizer]


@dataclass(frozen=True)
class Held:
    """Bytes of one trained parameter as a whole, by cause; numbers or arrays alike.

    Attributes:
        weights: what stays in compute precision; 0 where only a master copy does.
        gradient: kept until the update; `reduced` while it is synchronised.
        optimizer: states and master copy.
        update: moved by one update.
    """

    weights: Any
    gradient: Any
    optimizer: Any
    reduced: Any
    update: Any


def held_bytes(num_bytes: Any, item_bytes: Any, states: int, software: Software) -> Held:
    """What `software` keeps of a trained parameter of `num_bytes`, `item_bytes` per element, with so many states."""
    count = num_bytes / item_bytes
    gradient = num_bytes if software.gradient_bytes is None else count * software.gradient_bytes
    state = states * (num_bytes if software.state_bytes is None else count * software.state_bytes)
    master = count * software.master_bytes
    weights = num_bytes if software.keeps_copy else 0.0 * num_bytes
    rewritten = 2 * master + weights if software.master_bytes else 2 * num_bytes
    reduced = num_bytes if software.reduce_bytes is None else count * software.reduce_bytes
    return Held(weights, gradient, state + master, reduced, rewritten + gradient + 2 * state)


def gradient_bytes(value: Value, software: Software) -> float:
    """Bytes of the whole gradient of a trained parameter."""
    item_bytes = BYTES_BY_DTYPE[value.meta.dtype]
    return float(held_bytes(value.meta.num_bytes, item_bytes, 0, software).gradient)


def optimizer_bytes(graph: OpGraph, states: int, software: Software) -> float:
    """Bytes of so many states of all trained parameters, master copies included."""
    trained = [(v.meta.num_bytes, BYTES_BY_DTYPE[v.meta.dtype]) for v in graph.parameters if v.requires_grad]
    return float(sum(held_bytes(size, item, states, software).optimizer for size, item in trained))


_NEVER = np.bool_(False)


@dataclass(frozen=True)
class Synced:
    """Gradients of one device that are copied into buckets; numbers or arrays alike.

    Attributes:
        summed: bytes of those that are summed, smaller than a bucket: a larger one is summed where it lies.
        scattered: bytes of those that are scattered, however large.
        largest: bytes of the largest one that is scattered.
        parts: bytes of what scattering leaves.
        early, early_largest, early_parts: the same three of those that are scattered after every microbatch.
    """

    summed: Any = 0.0
    scattered: Any = 0.0
    largest: Any = 0.0
    parts: Any = 0.0
    early: Any = 0.0
    early_largest: Any = 0.0
    early_parts: Any = 0.0

    @property
    def room(self) -> Any:
        """Bytes beyond all gradients at the worst moment.

        That is when the largest bucket is filled; buckets under way take the place of their gradients. Where only parts
        are left of gradients, updated parts are gathered in less. Of those scattered early only parts count as
        gradients, so that their bucket is beyond them, and what it is copied from, and the parts that are added.
        """
        bucket = np.maximum(self.largest, np.minimum(self.scattered, BUCKET_BYTES))
        late = np.maximum(np.minimum(self.summed, BUCKET_BYTES), bucket)
        early = np.maximum(self.early_largest, np.minimum(self.early, BUCKET_BYTES))
        return np.maximum(late, early * (2.0 + self.early_parts / np.maximum(self.early, 1.0)))

    def __add__(self, other: Synced) -> Synced:
        return Synced(
            self.summed + other.summed,
            self.scattered + other.scattered,
            np.maximum(self.largest, other.largest),
            self.parts + other.parts,
            self.early + other.early,
            np.maximum(self.early_largest, other.early_largest),
            self.early_parts + other.early_parts,
        )


def synced(
    gradient: Any, reduced: Any, scattered: Any, parts: Any, software: Software, *, early: Any = _NEVER
) -> Synced:
    """Of one parameter with a local gradient of so many bytes before any cut.

    Args:
        gradient: bytes.
        reduced, scattered: on some axis; a gradient that is scattered counts as such.
        parts: into how many scattering cuts it.
        software: that copies gradients or not.
        early: it is scattered after every microbatch.
    """
    if not software.copies_gradients:
        return Synced(*(0.0 * gradient for _ in range(7)))
    whole, soon = np.where(scattered & ~early, gradient, 0.0), np.where(early, gradient, 0.0)
    summed = np.where(reduced & ~scattered & (gradient < BUCKET_BYTES), gradient, 0.0)
    return Synced(summed, whole, whole, whole / parts, soon, soon, soon / parts)


def synced_gradient(
    gradient: float, strategy: ParameterStrategy, axis_sizes: Sequence[int], software: Software
) -> Synced:
    """As `synced`, of one parameter under its strategy; `gradient` is what is kept of it."""
    is_reduced = any(axis.label == "replicated" for axis in strategy)
    late, early = (_parts(strategy, axis_sizes, label) for label in ("zero1", "zero2"))
    reduced, scattered = np.bool_(is_reduced), np.bool_(late * early > 1)
    return synced(gradient * early, reduced, scattered, late * early, software, early=np.bool_(early > 1))


def _parts(strategy: ParameterStrategy, axis_sizes: Sequence[int], label: str) -> int:
    """Ranks on the axes with this label."""
    return math.prod(size for axis, size in zip(strategy, axis_sizes, strict=True) if axis.label == label)


def parameter_bytes(
    value: Value, strategy: ParameterStrategy, axis_sizes: Sequence[int], states: int, software: Software
) -> tuple[float, float, float]:
    """Bytes of a parameter, its gradient and its optimizer state (with a master copy) on one device.

    The gradient lies where the parameter does (zero1 gathers no gradient, but holds the whole one until the step; zero2
    does not).
    """

    def cut(sharding: Sharding) -> int:
        return math.prod(size for p, size in zip(sharding, axis_sizes, strict=True) if p.is_shard)

    stored = cut(storage_sharding(strategy))
    if not value.requires_grad:
        return value.meta.num_bytes / stored, 0.0, 0.0
    held = held_bytes(value.meta.num_bytes, BYTES_BY_DTYPE[value.meta.dtype], states, software)
    gradient = held.gradient / (stored * _parts(strategy, axis_sizes, "zero2"))
    return held.weights / stored, gradient, held.optimizer / cut(optimizer_sharding(strategy))
