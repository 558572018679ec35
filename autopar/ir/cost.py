"""Cost table: the optimisation problem of one stage mesh and one microbatch size, as arrays.

`cost` fills it, `search` minimises over it, and nobody else prices anything. Nodes choose one strategy each, edges
price the pair of choices at their ends:

- an `op` node chooses how to run an op,
- a `hub` node chooses the one placement in which a value read by several ops is kept for all of them,
- a `param` node chooses how a parameter is stored and exposed.

Structurally identical blocks share their nodes: a node stands for the same op in every block of its class
(`blocks`). All times are seconds, energies joules, sizes bytes, on one device; energy is dynamic energy, i.e. above
the blocked power that the step pays per device and second anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.placement import Sharding
from autopar.ir.strategy import ParameterStrategy, Strategy

Array: TypeAlias = NDArray[np.float64]

NodeChoice: TypeAlias = "Strategy | Sharding | ParameterStrategy"


@dataclass(frozen=True)
class CostNode:
    """One choice. Arrays have one entry per strategy.

    Attributes:
        name: op name (`op`), value name prefixed `hub:` (`hub`), value name prefixed `param:` (`param`), all of the
            class's first block.
        kind: `op`, `hub` or `param`.
        choices: what each strategy is: Strategy, Sharding or ParameterStrategy by kind.
        blocks: indices of the blocks in which the node occurs; (-1,) for shared ops, which every stage computes.
        names: the concrete op or value names, parallel to `blocks`.
        forward_s, backward_s: of one microbatch, one block.
        step_s: paid once a step (gradient synchronisation, optimizer), one block.
        microbatch_j, step_j: dynamic energy on one device, same division.
        state_bytes: alive the whole step (parameter, gradient, optimizer state).
        activation_bytes: kept from forward to backward, per microbatch in flight, without recompute.
        boundary_bytes: size of the value that enters the next block (0 if none does): all that full recompute keeps.
        workspace_bytes: transient, the largest over all nodes of a stage counts once.
        traffic: of a parameter whose collectives run beside computation (None: none does): what they take in full.
            `forward_s`, `backward_s` and `step_s` then hold the part that is expected to stay visible.
        outside: of an op whose activations are offloaded (None: none are): how long that takes in full. `forward_s`
            and `backward_s` then contain the part that is expected to stay visible.
    """

    name: str
    kind: str
    choices: tuple[Any, ...]
    blocks: tuple[int, ...]
    names: tuple[str, ...]
    forward_s: Array
    backward_s: Array
    step_s: Array
    microbatch_j: Array
    step_j: Array
    state_bytes: Array
    activation_bytes: Array
    boundary_bytes: Array
    workspace_bytes: Array
    traffic: Traffic | None = None
    outside: Outside | None = None


@dataclass(frozen=True)
class Outside:
    """Activations per strategy that leave the device in forward, and come back in backward, of one microbatch.

    Attributes:
        num_bytes: that move, each way.
        seconds: of moving them one way, alone on the link.
        forward_s, backward_s: the part of that which is expected to show.
    """

    num_bytes: Array
    seconds: Array
    forward_s: Array
    backward_s: Array


@dataclass(frozen=True)
class Traffic:
    """Seconds per strategy of a parameter's collectives, alone on the link: of one microbatch, `sync_s` once a step.

    Attributes:
        gather_s, regather_s: of the whole parameter, before forward and again before backward.
        scatter_s: of its gradient, after each backward.
        sync_s: of its gradient, after the last backward.
        update_s: the optimizer's work, which is no traffic but follows it.
        adding_s: computation of each backward, adding its gradient to those of earlier microbatches.
    """

    gather_s: Array
    regather_s: Array
    scatter_s: Array
    sync_s: Array
    update_s: Array
    adding_s: Array

    def part(self, start: int, stop: int) -> Traffic:
        """Views of some strategies."""
        return Traffic(*(array[start:stop] for array in vars(self).values()))


@dataclass(frozen=True)
class CostEdge:
    """Redistribution between two nodes. Arrays are [choices of source, choices of target]; inf forbids the pair.

    Attributes:
        source, target: node indices; equal for a block that feeds the next block of its class (then only the
            diagonal counts).
        blocks: for each concrete edge, the block of the consumer, which pays (-1: a shared op pays).
        cut_pairs: for each concrete edge, (block of producer, block of consumer).
    """

    source: int
    target: int
    blocks: tuple[int, ...]
    cut_pairs: tuple[tuple[int, int], ...]
    forward_s: Array
    backward_s: Array
    microbatch_j: Array


@dataclass(frozen=True)
class Crossing:
    """A differentiable value that some block makes and later blocks read: sent along when a cut falls between.

    Attributes:
        value: name of the value.
        node: index of the node (hub or op) whose choice fixes its placement.
        producer_block, last_block: first block of the interval and last block that reads it.
        bytes_by_choice: local bytes of one microbatch, per choice of the node.
    """

    value: str
    node: int
    producer_block: int
    last_block: int
    bytes_by_choice: Array


@dataclass(frozen=True)
class ClockFigures:
    """Figures of all nodes of a table at every clock: [clock, choice], the choices of all nodes one after the other."""

    forward_s: Array
    backward_s: Array
    microbatch_j: Array

    def at(self, table: CostTable, clock: int) -> CostTable:
        """The table at another clock."""
        nodes, start = [], 0
        for node in table.nodes:
            span = slice(start, start + len(node.choices))
            start = span.stop
            nodes.append(
                replace(
                    node,
                    forward_s=self.forward_s[clock, span],
                    backward_s=self.backward_s[clock, span],
                    microbatch_j=self.microbatch_j[clock, span],
                )
            )
        return replace(table, nodes=tuple(nodes))


@dataclass(frozen=True)
class Link:
    """One device sending to another, all devices of a stage at once; joules are of the sender."""

    latency_s: float
    s_per_byte: float
    j_per_byte: float


@dataclass(frozen=True)
class CostTable:
    """The whole problem for one (mesh, number of microbatches).

    Attributes:
        labels: how costs are known: label -> number of (node, choice) entries with that label.
        p2p_s_per_byte, p2p_latency_s, p2p_j_per_byte: send between neighbouring stages of this mesh.
    """

    mesh: StageMesh
    num_microbatches: int
    num_blocks: int
    nodes: tuple[CostNode, ...]
    edges: tuple[CostEdge, ...]
    crossings: tuple[Crossing, ...]
    p2p_latency_s: float
    p2p_s_per_byte: float
    p2p_j_per_byte: float
    labels: Mapping[str, int]

    @property
    def link(self) -> Link:
        """Between neighbouring stages."""
        return Link(self.p2p_latency_s, self.p2p_s_per_byte, self.p2p_j_per_byte)


class Device(Protocol):
    """What the search must know of the cluster beyond the tables."""

    @property
    def memory_bytes(self) -> int:
        """Usable memory of one device after framework context and allocator reserve."""

    @property
    def blocked_w(self) -> float:
        """Power of one device that waits with a live context."""

    @property
    def host_w_per_node(self) -> float:
        """Power of a node's host while the job runs."""

    @property
    def num_gpus(self) -> int:
        """Ceiling on the number of devices."""

    @property
    def gpus_per_node(self) -> int:
        """Devices that share the fast link."""


class TableSource(Protocol):
    """Makes cost tables on demand; given to the search by the planner."""

    @property
    def graph(self) -> OpGraph: ...

    @property
    def device(self) -> Device: ...

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        """Clocks that devices may be locked at, highest first; the first is that of a device left alone."""

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        """The table at the highest clock, or None where the batch does not divide into that many microbatches."""

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        """What differs in that table at each of `clocks_hz`; a lower clock takes no less time and no more energy."""
