"""StageProgram: what one rank runs of one stage, as segments. `rewrite` builds it, `runtime` runs it.

Flow of a microbatch: the `shared` segment (ops that depend on the batch alone), then one segment per block. Values
pass between segments, and over the cuts, in the placement in which the plan keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx

from autopar.ir.passes import Passes, Runs
from autopar.ir.placement import Sharding
from autopar.program.collectives import AxisGroup
from autopar.program.delayed import DelayedWeights
from autopar.program.gathered import GatherScope, GatherSteps
from autopar.program.local_ops import attention_dropout, dropout
from autopar.program.recompute import Keeper
from autopar.program.stream import StreamState
from autopar.torch_adapter import is_op_overload, is_random


@dataclass(frozen=True)
class Segment:
    """A piece of a stage's forward.

    Attributes:
        name: of the block, or `shared`.
        module: takes `inputs`, returns the tuple of `outputs`.
        inputs, outputs: value names. The last output of the last segment may be `LOSS_OUTPUT`.
        gathered: parameters gathered for use here, by value name, and how.
        runs_again: backward runs it a second time instead of keeping what it saves.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    gathered: tuple[tuple[str, GatherSteps], ...] = ()
    runs_again: bool = False

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """Nodes of its graph and of the graphs inside."""
        for module in self.module.modules():
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes


LOSS_OUTPUT = "loss:whole"
"""Name of the output that holds the loss as I on every axis."""


def left_name(value: str) -> str:
    """Name of the output of a segment that holds an output of the graph as it leaves."""
    return f"{value}:left"


@dataclass(frozen=True)
class BoundaryTensor:
    """A value that crosses a cut, as one rank sends or receives it.

    Attributes:
        shape: of the rank's part.
        whole: shape of the whole value.
        sharding: that it crosses in, on both sides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    whole: tuple[int, ...] = ()
    sharding: Sharding = ()


@dataclass(frozen=True)
class Behind:
    """The blocks behind a switch from data to tensor parallelism, of one pass.

    Attributes:
        program: receives what crosses the switch with the samples of all ranks of `axis`, and ends in the loss.
        passes: of the plan.
        axis: whose ranks gather each other's samples.
        dims: of each received value, which counts samples.
        runs: of each pass, its samples.
    """

    program: StageProgram
    passes: Passes
    axis: AxisGroup
    dims: tuple[int, ...]
    runs: tuple[Runs, ...]


@dataclass(frozen=True)
class StageProgram:
    """See the module docstring.

    Attributes:
        stage, num_stages: position in the pipeline.
        coordinate: position on the axes of the stage mesh.
        shared: segment of the shared ops, or None.
        segments: one per block.
        received, sent: what crosses the cuts before and after.
        parameters, buffers, constants, inputs: names of the outside values read, in graph order.
        updated_buffers: buffers that some op of the stage changes in place.
        stream, scope, keeper, delayed, axes: the objects that its nodes refer to.
        behind: what of the stage runs in passes, with the names that it reads among those above; None: nothing does.
        entering, leaving: of inference, the placement in which each batch input comes in (the others: whole), and that
            in which each output made here leaves.
    """

    stage: int
    num_stages: int
    coordinate: tuple[int, ...]
    shared: Segment | None
    segments: tuple[Segment, ...]
    received: tuple[BoundaryTensor, ...]
    sent: tuple[BoundaryTensor, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]
    inputs: tuple[str, ...]
    updated_buffers: tuple[str, ...]
    stream: StreamState
    scope: GatherScope
    keeper: Keeper
    delayed: DelayedWeights
    axes: tuple[AxisGroup, ...]
    behind: Behind | None = None
    entering: Mapping[str, Sharding] = field(default_factory=dict)
    leaving: Mapping[str, Sharding] = field(default_factory=dict)

    @property
    def draws_random(self) -> bool:
        """Some op draws from the random streams, or from torch's own."""
        segments = [s for s in (self.shared, *self.segments) if s is not None]
        own = any(_draws_random(node.target) for segment in segments for node in segment.nodes)
        return own or (self.behind is not None and self.behind.program.draws_random)

    @property
    def streams(self) -> tuple[StreamState, ...]:
        """Its position in the random streams, and that of what runs in passes."""
        return (self.stream,) if self.behind is None else (self.stream, *self.behind.program.streams)

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1


def _draws_random(target: object) -> bool:
    """Dropout that drops has become a local operation; what is left of ATen's own does nothing."""
    if target in (dropout, attention_dropout):
        return True
    return is_op_overload(target) and is_random(target) and not str(target).startswith(_IDLE_DROPOUT)


_IDLE_DROPOUT = ("aten.dropout.", "aten.scaled_dot_product_attention.")
