"""Stage costs: sums of one plan over its cost table, stage by stage.

As defined by the search: shared entries count in every stage, a parameter counts in every stage that reads it, an edge
in the stage of its consumer. Seconds are kept per block, because communication that runs beside computation is laid
on streams block by block (`ir.streams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from autopar.cost.carried import carried
from autopar.cost.copies import copied_bytes
from autopar.cost.memory import Synced, parameter_bytes, synced_gradient
from autopar.cost.table import CostTables
from autopar.cost.weights import WeightHalves
from autopar.errors import PlanMismatchError
from autopar.ir.cost import CostEdge, CostNode, CostTable
from autopar.ir.offload import SHARD_BYTES
from autopar.ir.solution import Decisions
from autopar.ir.strategy import ParameterStrategy
from autopar.ir.streams import BlockWork, Overlap, Streams, stage_times
from autopar.ir.timeline import StageTimes

SHARED = -1
STATE_CAUSES = ("parameters", "gradients", "optimizer")
"""What lasts from step to step."""
WORK = (
    "forward_s", "backward_s", "gather_s", "regather_s", "scatter_s", "sync_s", "update_s", "out_s", "back_s",
    "weight_s",
)  # fmt: skip
"""Fields of `BlockWork`."""
NOTHING: Mapping[tuple[int, int], int] = MappingProxyType({})


@dataclass
class BlockBytes:
    """Bytes of one block: kept of one microbatch, what of it leaves the block, gradients of its parameters, and the
    largest workspace.
    """

    activations: float = 0.0
    boundary: float = 0.0
    gradients: float = 0.0
    workspace: float = 0.0


@dataclass(frozen=True, slots=True)
class Wire:
    """What crosses the cut before a stage whose mesh is its own, of one microbatch.

    Attributes:
        busiest_bytes: that one rank sends or receives at most, in the direction of the more.
        total_bytes: of all ranks, both ways.
        is_near: all that is sent stays inside nodes.
    """

    busiest_bytes: float
    total_bytes: float
    is_near: bool


@dataclass
class StageCost:
    """Sums of one stage on one device: of one microbatch, or once a step where the name says so.

    Recompute is included in `backward_s` and `microbatch_j`. `workspace_bytes` is the largest of any node but
    parameters that are not gathered, `op_workspace_bytes` that of any but parameters. Of the others `synced` are the
    gradients that buckets copy, `bucket_limit_bytes` what the search reckons those take. `state` is by cause, `blocks`
    and `memory` by index (SHARED first).
    `times` are those of the streams that `blocks` run on. `wire` is None where stages have one mesh: then every device
    receives `received_bytes` from one other; of values that cross cuts `held_bytes` and `sent_bytes` are what
    `cost.carried` says. `offloaded` are bytes that lie elsewhere, of the optimizer and activations of one microbatch;
    `shard_bytes` of the former are on the device during the update, beside what stays there.
    `waiting` are the bytes, by cause, that one microbatch leaves between the halves of a backward that is split.
    Of a stage that ends in passes (`cost.passes`), `passing` are the streams of those over one microbatch, which is in
    `times` too, and `early_gradients` the bytes of the gradients that are there before its backward begins.
    """

    blocks: dict[int, dict[str, float]] = field(default_factory=dict)
    memory: dict[int, BlockBytes] = field(default_factory=dict)
    times: StageTimes = field(default_factory=lambda: StageTimes(0.0, 0.0, 0.0))
    microbatch_j: float = 0.0
    step_j: float = 0.0
    activation_bytes: float = 0.0
    boundary_bytes: float = 0.0
    largest_block_bytes: float = 0.0
    workspace_bytes: float = 0.0
    op_workspace_bytes: float = 0.0
    bucket_limit_bytes: float = 0.0
    synced: Synced = field(default_factory=Synced)
    received_bytes: float = 0.0
    held_bytes: float = 0.0
    sent_bytes: float = 0.0
    wire: Wire | None = None
    peak_w: float = 0.0
    passing: Streams | None = None
    early_gradients: float = 0.0
    state: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATE_CAUSES, 0.0))
    offloaded: dict[str, float] = field(default_factory=dict)
    shard_bytes: float = 0.0
    waiting: dict[str, float] = field(default_factory=dict)

    @property
    def waiting_bytes(self) -> float:
        return sum(self.waiting.values())

    @property
    def forward_s(self) -> float:
        return self.times.forward_s

    @property
    def backward_s(self) -> float:
        return self.times.backward_s

    @property
    def step_s(self) -> float:
        return self.times.step_s

    def works(self) -> list[BlockWork]:
        """Of the blocks in order."""
        return [BlockWork(**self.blocks[block]) for block in sorted(self.blocks)]

    def add(self, block: int, **seconds: float) -> None:
        """Adds work to a block."""
        own = self.blocks.setdefault(block, dict.fromkeys(WORK, 0.0))
        for name, value in seconds.items():
            own[name] += value

    def pay(self, block: int, forward_s: float, backward_s: float, energy_j: float, redo: bool) -> None:
        """Adds one entry of the computation stream; with `redo` its forward runs a second time in backward."""
        again = forward_s if redo else 0.0
        self.add(block, forward_s=forward_s, backward_s=backward_s + again)
        self.spend(forward_s + backward_s, again, energy_j)

    def wait(self, block: int, weight_s: float, waiting: Mapping[str, float]) -> None:
        """Notes what of a block's backward comes later, and the bytes that it needs until then, by cause."""
        if weight_s:
            self.add(block, weight_s=weight_s, backward_s=-weight_s)
        self.waiting |= waiting

    def keep(self, block: int, num_bytes: float) -> None:
        """Adds to what a block keeps for backward."""
        self.activation_bytes += num_bytes
        self.memory.setdefault(block, BlockBytes()).activations += num_bytes

    def spend(self, total_s: float, again_s: float, energy_j: float) -> None:
        """Adds the joules of an entry of `total_s` seconds, of which `again_s` pass a second time."""
        if total_s > 0:
            self.microbatch_j += energy_j * (1 + again_s / total_s)
            self.peak_w = max(self.peak_w, energy_j / total_s)


def chosen(table: CostTable, decisions: Decisions, behind: int = 0) -> tuple[int, ...]:
    """Index of the decided strategy of every node; with `behind` any of nodes that stand before that block alone.

    Raises:
        PlanMismatchError: if a decision is missing or is none of the node's choices.
    """
    parts: Mapping[str, Mapping[str, object]] = {
        "op": decisions.ops, "hub": decisions.hubs, "param": decisions.parameters,
    }  # fmt: skip
    found = []
    for node in table.nodes:
        decided = parts[node.kind].get(node.names[0])
        if decided is None and len(node.choices) == 1:
            found.append(0)
        elif decided in node.choices:
            found.append(node.choices.index(decided))
        elif all(block < behind for block in node.blocks):
            found.append(0)
        else:
            raise PlanMismatchError(f"the plan's choice for {node.name!r} is not one this model and mesh allow")
    return tuple(found)


def stage_costs(
    tables: CostTables,
    table: CostTable,
    decisions: Decisions,
    *,
    choice: Sequence[int] | None = None,
    entering: Mapping[tuple[int, int], int] = NOTHING,
    behind: int = 0,
) -> tuple[StageCost, ...]:
    """Sums of every stage, as defined by the search: shared entries count in every stage, a parameter counts in
    every stage that reads it, an edge in the stage of its consumer.

    Args:
        choice: of every node, by index; None: as decided.
        behind: sums are good from this block on, and free of redistributions of what comes from before it.
        entering: (node, block) -> its choice as stages after that of the block see it, where it is another.
    """
    choice = chosen(table, decisions, behind) if choice is None else choice
    stage_of = [k for k, stage in enumerate(decisions.stages) for _ in range(stage.start, stage.stop)]
    redo = [stage.recompute == "full" for stage in decisions.stages]
    stages = [StageCost() for _ in decisions.stages]
    everywhere = range(len(stages))
    per_block = [0.0] * table.num_blocks
    halves = WeightHalves(tables, table, decisions)
    for index, k, block in _occurrences(table, stage_of):
        _add_node(stages[k], block, table.nodes[index], choice[index], redo=redo[k] and block != SHARED)
        weight_s, waiting = halves.of(table.nodes[index], choice[index], k, block)
        stages[k].wait(block, weight_s, waiting)
        if block != SHARED:
            per_block[block] += float(table.nodes[index].activation_bytes[choice[index]])
        if table.nodes[index].kind == "param":
            strategy = table.nodes[index].choices[choice[index]]
            held = _held(tables, table, table.nodes[index], strategy)
            _add_state(stages[k], block, held)
            if tables.offload.optimizer is not None:
                _offload_states(stages[k], held[2], leaves=tables.offload.optimizer.leaves)
            stages[k].synced += synced_gradient(held[1], strategy, table.mesh.sizes, tables.software)
    for edge in table.edges:
        prices = _edge_prices(edge, choice[edge.source], choice[edge.target])
        is_parameter = table.nodes[edge.source].kind == "param"
        for block, home in _ends(edge, 0 if is_parameter else behind):
            paid = prices
            if entering and (edge.source, home) in entering and stage_of[home] != stage_of[block]:
                paid = _edge_prices(edge, entering[edge.source, home], choice[edge.target])
            for k in everywhere if block == SHARED else (stage_of[block],):
                stages[k].pay(block, *paid, redo[k] and block != SHARED)
    for block, num_bytes in copied_bytes(tables, table, decisions, behind).items():
        stages[stage_of[block]].keep(block, num_bytes)
        per_block[block] += num_bytes
    for k, (stage, own) in enumerate(zip(decisions.stages, carried(tables, table, decisions, choice), strict=True)):
        stages[k].received_bytes, stages[k].held_bytes, stages[k].sent_bytes = own
        stages[k].largest_block_bytes = max(per_block[stage.start : stage.stop])
        stages[k].shard_bytes = min(stages[k].offloaded.get("optimizer", 0.0), max(stages[k].shard_bytes, SHARD_BYTES))
        stages[k].times = stage_times(stages[k].works(), overlap_of(tables))
    return tuple(stages)


def _ends(edge: CostEdge, behind: int) -> Iterator[tuple[int, int]]:
    """Blocks of consumer and producer, but for pairs with `behind` between them."""
    for block, (home, _) in zip(edge.blocks, edge.cut_pairs, strict=True):
        if not 0 <= home < behind <= block:
            yield block, home


def _edge_prices(edge: CostEdge, source: int, target: int) -> tuple[float, float, float]:
    """Forward and backward seconds and joules of one microbatch."""
    at = source, target
    return float(edge.forward_s[at]), float(edge.backward_s[at]), float(edge.microbatch_j[at])


def overlap_of(tables: CostTables) -> Overlap:
    """What runs side by side under the software of the tables."""
    software = tables.software
    slowdown = tables.cluster.spec.overlap_slowdown
    offload = tables.offload.activations is not None and tables.offload.activations.hides
    return Overlap(software.prefetch_parameters, software.overlap_gradients, slowdown, offload)


def _occurrences(table: CostTable, stage_of: list[int]) -> Iterator[tuple[int, int, int]]:
    """(node, stage, block) of everything a stage computes or holds."""
    readers: dict[tuple[int, int], set[int]] = {}
    for edge in table.edges:
        if table.nodes[edge.source].kind == "param":
            for home, reader in edge.cut_pairs:
                if reader != home:
                    readers.setdefault((edge.source, home), set()).add(reader)
    for index, node in enumerate(table.nodes):
        for block in node.blocks:
            if block == SHARED:
                yield from ((index, k, SHARED) for k in range(max(stage_of) + 1))
                continue
            yield index, stage_of[block], block
            others = {stage_of[b]: b for b in sorted(readers.get((index, block), ()))}
            yield from ((index, k, b) for k, b in sorted(others.items()) if k != stage_of[block])


def _add_node(stage: StageCost, block: int, node: CostNode, p: int, redo: bool) -> None:
    energy_j, traffic = float(node.microbatch_j[p]), node.traffic
    if traffic is None:
        shown_forward_s, shown_backward_s = _move_activations(stage, block, node, p)
        forward_s, backward_s = float(node.forward_s[p]) - shown_forward_s, float(node.backward_s[p]) - shown_backward_s
        stage.pay(block, forward_s, backward_s, energy_j, redo)
        stage.add(block, update_s=float(node.step_s[p]))
    else:
        seconds = {name: float(values[p]) for name, values in vars(traffic).items()}
        adding_s = seconds.pop("adding_s")
        stage.add(block, backward_s=adding_s, **seconds)
        stage.spend(seconds["gather_s"] + seconds["regather_s"] + seconds["scatter_s"] + adding_s, 0.0, energy_j)
    stage.step_j += float(node.step_j[p])
    stage.keep(block, float(node.activation_bytes[p]))
    stage.boundary_bytes += float(node.boundary_bytes[p])
    own, workspace = stage.memory[block], float(node.workspace_bytes[p])
    own.boundary += float(node.boundary_bytes[p])
    if node.kind == "param" and all(axis.label != "zero3" for axis in node.choices[p]):
        stage.bucket_limit_bytes = max(stage.bucket_limit_bytes, workspace)
        return
    own.workspace = max(own.workspace, workspace)
    stage.workspace_bytes = max(stage.workspace_bytes, workspace)
    if node.kind != "param":
        stage.op_workspace_bytes = max(stage.op_workspace_bytes, workspace)


def _move_activations(stage: StageCost, block: int, node: CostNode, p: int) -> tuple[float, float]:
    """Adds the moves of what is offloaded; seconds of them that the node's own contain."""
    outside = node.outside
    if outside is None or not outside.num_bytes[p]:
        return 0.0, 0.0
    stage.add(block, out_s=float(outside.seconds[p]), back_s=float(outside.seconds[p]))
    stage.offloaded["activations"] = stage.offloaded.get("activations", 0.0) + float(outside.num_bytes[p])
    return float(outside.forward_s[p]), float(outside.backward_s[p])


def _offload_states(stage: StageCost, size: float, *, leaves: bool) -> None:
    """States of one parameter lie elsewhere, and are gone from the device if it is another memory."""
    stage.offloaded["optimizer"] = stage.offloaded.get("optimizer", 0.0) + size
    stage.shard_bytes = max(stage.shard_bytes, size)
    stage.state["optimizer"] -= size if leaves else 0.0


def _held(tables: CostTables, table: CostTable, node: CostNode, strategy: ParameterStrategy) -> tuple[float, ...]:
    """Bytes of a parameter, by STATE_CAUSES."""
    value = tables.graph.values[node.names[0]]
    sizes = parameter_bytes(value, strategy, table.mesh.sizes, tables.optimizer_states, tables.software)
    return sizes if tables.training else (sizes[0], 0.0, 0.0)


def _add_state(stage: StageCost, block: int, sizes: tuple[float, ...]) -> None:
    for cause, size in zip(STATE_CAUSES, sizes, strict=True):
        stage.state[cause] += size
    stage.memory[block].gradients += sizes[1]
