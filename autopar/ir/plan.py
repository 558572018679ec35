"""Plan: the one thing handed from planning to execution, and what `plan.json` holds.

A plan is decisions plus everything a reader needs to trust them: which model and cluster they were made for, what
they should cost, how far from optimal they can be. It is never executable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.ir.cluster import ClusterDescription
from autopar.ir.codec import ADDED
from autopar.ir.quantity import Quantity
from autopar.ir.software import Software
from autopar.ir.solution import Alternative, Decisions, Limits, Objective

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class ModelReference:
    """How to build the model again.

    Attributes:
        source: `examples/gpt2.py` or `hf:config.json`, as given.
        options: the `--set` options, as text.
        graph_hash: SHA-256 of the captured graph (ops, shapes, wiring).
        batch_size: samples in one global batch.
    """

    source: str
    options: Mapping[str, str]
    graph_hash: str
    batch_size: int


@dataclass(frozen=True)
class ClusterReference:
    """The cluster that was priced.

    Attributes:
        gpu: kebab-case name in `costmodels/`.
        num_gpus: ceiling given to the planner.
        input_hash: SHA-256 of every number that shaped the prices (device file, links, profile rows).
        origin: `flag`, `detected` or `default`: where the choice of GPU came from.
        description: of a cluster of several types; then `gpu` joins their names, and the other figures are totals
            (GPUs) and the most of any type.
        network_bytes_per_s: of a node's network ports, where the request gave it; else None.
        gpu_power_limit_w: set on every GPU, where the request gave it; else None.
    """

    gpu: str
    num_gpus: int
    gpus_per_node: int
    memory_bytes: int
    input_hash: str
    origin: str
    description: ClusterDescription | None = None
    network_bytes_per_s: float | None = None
    gpu_power_limit_w: float | None = None


@dataclass(frozen=True)
class StageFigures:
    """Predicted figures of one stage. Seconds are of one microbatch, except `step_s` (once a step).

    `offloaded` are bytes of one device that lie where the plan offloads them, `optimizer` and `activations`; None: it
    does not.
    """

    forward_s: Quantity
    backward_s: Quantity
    step_s: Quantity
    peak_memory_bytes: Quantity
    memory_by_cause: Mapping[str, float]
    offloaded: Mapping[str, float] | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class Prediction:
    """What one step should cost, over all devices used. Scope of energy and power: GPUs plus hosts.

    Attributes:
        energy_by_cause: joules: `dynamic`, `blocked`, `host`.
        tdp_energy_j: the naive figure, board power limit x step time x devices, for comparison.
        sources: how many priced entries carry each label.
    """

    step_time_s: Quantity
    energy_j: Quantity
    average_power_w: Quantity
    peak_power_w: Quantity
    peak_memory_bytes: tuple[Quantity, ...]
    stages: tuple[StageFigures, ...]
    energy_by_cause: Mapping[str, float]
    tdp_energy_j: float
    sources: Mapping[str, int]


@dataclass(frozen=True)
class Baseline:
    """The best plan of a well-known family, searched and simulated like the plan itself.

    Attributes:
        name: `data parallel`, `fsdp` or `tensor x pipeline x data`.
        description: its mesh, stages and microbatches; "" where there is none.
        num_gpus: devices it uses; 0 where there is none.
        step_time_s, energy_j, peak_memory_bytes: simulated; memory of the fullest device. None where it does not fit.
        reason: "" if it fits and keeps the limits, else why not.
    """

    name: str
    description: str
    num_gpus: int
    step_time_s: Quantity | None
    energy_j: Quantity | None
    peak_memory_bytes: Quantity | None
    reason: str


@dataclass(frozen=True)
class SolverReport:
    """How the decisions were found. `objective` and `bound` are formula values in the objective's unit."""

    status: str
    objective: float
    bound: float
    gap: float
    wall_s: float
    name: str


@dataclass(frozen=True)
class Plan:
    """See the module docstring.

    Attributes:
        limits: what the figures keep besides memory.
        baselines: what well-known ways to split the model would cost on the same devices.
        rule_free_ops: target -> number of ops that have no sharding rule and are therefore replicated.
        notes: sentences for the reader (assumptions, defaults taken, warnings).
        software: how the figures assume that the program runs.
        pinned: what the request fixed, see `ir.pin_fields`; None: nothing, or an older file, which does not say.
        tokens_per_sample: of plans for inference, where a sample is a sequence of indices; else 0.
        created: when and by which versions; the only part that may differ between equal runs.
    """

    schema_version: int
    model: ModelReference
    cluster: ClusterReference
    objective: Objective
    limits: Limits
    decisions: Decisions
    predicted: Prediction
    solver: SolverReport
    rule_free_ops: Mapping[str, int]
    baselines: tuple[Baseline, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]
    created: Mapping[str, str]
    software: Software = field(default_factory=Software)
    pinned: Mapping[str, str] | None = field(default=None, metadata=ADDED)
    tokens_per_sample: int = field(default=0, metadata=ADDED)
