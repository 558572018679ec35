"""Price of policies that keep replicas in step (`ir.sync`), from prices of collectives and sends alone.

A worker computes for c seconds, an exchange takes x (each transfer as `cost.collective` prices it), applying a gradient
a (the bytes that the optimizer's kernel moves, at the device's memory rate). Nothing overlaps, as in the runtime. One
step of the global batch, on W workers, takes

    all-reduce     c + x + a
    local=H        c + a + x / H
    ps-sync        c + W (push + a) + a + W pull               a server takes messages one after another
    ps-async       max(c + push + a + pull, W (push + a + pull))      a worker's round, or the server's of W gradients

where workers in other nodes than the server's have slower pushes and pulls, each over one device's share of the ports.

The last line is the steady state of a closed cycle with one queue and constant times; bounds in general: Denning and
Buzen 1978 (operational analysis). Energy is dynamic energy of computing, applying and sending, plus blocked power of
every process (the server's too) and power of the hosts for the whole step. Coding and decoding are not priced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cost.collective import collective_cost, send_cost
from autopar.cost.hardware import Cluster
from autopar.cost.memory import held_bytes, optimizer_states
from autopar.cost.power import byte_energy_j, stage_w
from autopar.cost.roofline import memory_rate
from autopar.ir.mesh import Group
from autopar.ir.quantity import modelled
from autopar.ir.software import Software
from autopar.ir.sync import SyncPolicy, SyncPrice, Transfer, exchange


@dataclass(frozen=True)
class Work:
    """What one worker does in a step besides exchanging and applying.

    Attributes:
        compute_s: forward and backward of its samples.
        compute_j: dynamic energy of that.
    """

    compute_s: float
    compute_j: float


@dataclass(frozen=True)
class Exchanged:
    """What is exchanged as one message: shapes of the parameters, bytes of an entry, and what applies gradients."""

    shapes: Sequence[tuple[int, ...]]
    item_bytes: int
    optimizer: str = "sgd"

    @property
    def num_bytes(self) -> int:
        return self.item_bytes * sum(math.prod(shape) for shape in self.shapes)


def work_of(cluster: Cluster, compute_s: float) -> Work:
    """Work of known time, at the power of a device that computes a training stage."""
    return Work(compute_s, compute_s * (stage_w(cluster.spec) - cluster.blocked_w))


def apply_cost(cluster: Cluster, what: Exchanged) -> tuple[float, float]:
    """Seconds and joules of applying one gradient, as the cost tables price an update."""
    states = optimizer_states(what.optimizer)
    moved = held_bytes(what.num_bytes, what.item_bytes, states, Software()).update
    return moved / memory_rate(cluster.spec), moved * byte_energy_j(cluster.spec)


@dataclass(frozen=True)
class _Round:
    """What both kinds of policy are priced from."""

    cluster: Cluster
    policy: SyncPolicy
    sent: tuple[Transfer, ...]
    num_workers: int
    compute_s: float
    apply_s: float


@dataclass(frozen=True)
class _Step:
    """Of the global batch: `applied` gradients in all, `moved_j` joules of sending."""

    time_s: float
    exchange_s: float
    moved_j: float
    applied: int


def price_sync(cluster: Cluster, policy: SyncPolicy, what: Exchanged, work: Work, num_workers: int) -> SyncPrice:
    """Price of one step of the global batch, of which every worker has an equal part.

    Args:
        work: of one worker on its part.
        num_workers: >= 1; a server comes on top.
    """
    processes, spec = policy.num_processes(num_workers), cluster.spec
    apply_s, apply_j = apply_cost(cluster, what)
    sent = exchange(policy, what.shapes, what.item_bytes, num_workers)
    asked = _Round(cluster, policy, sent, num_workers, work.compute_s, apply_s)
    step = _served(asked) if policy.has_server else _summed(asked)
    dynamic_j = num_workers * work.compute_j + step.applied * apply_j + step.moved_j
    fixed_w = spec.blocked_w * processes + spec.host_w_per_node * cluster.nodes(processes)
    energy_j = dynamic_j + fixed_w * step.time_s
    return SyncPrice(
        policy=policy,
        num_workers=num_workers,
        step_time_s=modelled(step.time_s, "s", spec.time_uncertainty),
        energy_j=modelled(energy_j, "J", spec.energy_uncertainty),
        average_power_w=modelled(energy_j / step.time_s, "W", spec.energy_uncertainty),
        compute_s=work.compute_s,
        exchange_s=step.exchange_s,
        dynamic_j=dynamic_j,
        fixed_w=fixed_w,
        sent_bytes=sum(transfer.handed_bytes(num_workers) for transfer in sent) / policy.local_steps,
        staleness=policy.staleness(num_workers),
    )


def _summed(asked: _Round) -> _Step:
    """Collectives of the workers, every H steps."""
    group, every = Group(asked.num_workers, 1), asked.policy.local_steps
    pairs = [(collective_cost(asked.cluster, transfer.kind, group), transfer.num_bytes) for transfer in asked.sent]
    exchange_s = sum(cost.time_s(num_bytes) for cost, num_bytes in pairs) / every
    moved_j = asked.num_workers * sum(cost.j_per_byte * num_bytes for cost, num_bytes in pairs) / every
    return _Step(asked.compute_s + asked.apply_s + exchange_s, exchange_s, moved_j, asked.num_workers)


def _served(asked: _Round) -> _Step:
    """Pushes and pulls, of the workers beside the server and of those in other nodes."""
    policy, cluster, num_workers = asked.policy, asked.cluster, asked.num_workers
    near = min(num_workers, cluster.gpus_per_node - 1)
    groups = [(near, send_cost(cluster, same_node=True)), (num_workers - near, send_cost(cluster, same_node=False))]
    sent_bytes = sum(transfer.num_bytes for transfer in asked.sent)
    rounds = [
        (count, sum(link.time_s(transfer.num_bytes) for transfer in asked.sent) + asked.apply_s)
        for count, link in groups
        if count
    ]
    moved_j = sent_bytes * sum(count * link.j_per_byte for count, link in groups)
    served_s, slowest_s = sum(count * own_s for count, own_s in rounds), max(own_s for _, own_s in rounds)
    if policy.kind == "ps-sync":
        exchange_s = served_s + asked.apply_s
        return _Step(asked.compute_s + exchange_s, exchange_s, moved_j, num_workers + 1)
    return _Step(max(asked.compute_s + slowest_s, served_s), slowest_s, moved_j, num_workers)
