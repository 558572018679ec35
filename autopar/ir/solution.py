"""Solution: what a search decided and how sure it is that nothing better exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autopar.ir.codec import ADDED
from autopar.ir.mesh import StageMesh
from autopar.ir.offload import NOWHERE, Offload
from autopar.ir.passes import Passes
from autopar.ir.placement import Sharding
from autopar.ir.strategy import ParameterStrategy, Strategy

RECOMPUTE = ("none", "full", "selective", "selective-op", "alternate")
"""What backward computes again: nothing; every block, from its input; attention between its projections (Korthikanti
et al. 2022); everything but half of the products and attention (torchtitan's per-op policy); every second block."""
KEPT = ("none", "selective", "selective-op", "alternate")
"""Values of RECOMPUTE that a cost table is made for; `full` is derived from any of them."""
OBJECTIVES = ("time", "energy", "edp", "weighted", "cost", "carbon")
STATUSES = ("optimal", "feasible", "infeasible", "no-solution")


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised over one step.

    `time` (s), `energy` (J), `edp` (J s), and sums: `weighted` = time_weight * s + energy_weight * J, and `cost` and
    `carbon` = gpu_second_weight * GPUs * s + energy_weight * J (currency, or gCO2e, of a GPU-second and of a joule).
    `pue`, energy of the facility over that of GPUs and hosts, is contained in energy_weight.
    """

    kind: str
    time_weight: float = 0.0
    energy_weight: float = 0.0
    gpu_second_weight: float = 0.0
    pue: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.kind!r}")

    @property
    def is_linear(self) -> bool:
        return self.kind != "edp"

    def weights(self, num_gpus: int) -> tuple[float, float]:
        """Weights of seconds and joules on so many GPUs; of a linear objective only."""
        if self.kind == "time":
            return 1.0, 0.0
        if self.kind == "energy":
            return 0.0, 1.0
        if self.kind == "weighted":
            return self.time_weight, self.energy_weight
        if self.kind in ("cost", "carbon"):
            return self.gpu_second_weight * num_gpus, self.energy_weight
        raise ValueError(f"the objective {self.kind} is no weighted sum")

    def value(self, time_s: float, energy_j: float, num_gpus: int) -> float:
        if not self.is_linear:
            return time_s * energy_j
        time_weight, energy_weight = self.weights(num_gpus)
        return time_weight * time_s + energy_weight * energy_j


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits of one step that a plan must keep besides memory; None leaves one out.

    Attributes:
        deadline_s: step time.
        energy_j: energy of a step, in the scope of the prediction (GPUs and their hosts).
        average_power_w: energy over step time. A plan that would draw more is paced: its steps begin later, and the
            devices wait at blocked power meanwhile.
        peak_power_w: blocked and host power of everything used, plus the highest dynamic power of any op or
            redistribution of the plan on all devices at once.
    """

    deadline_s: float | None = None
    energy_j: float | None = None
    average_power_w: float | None = None
    peak_power_w: float | None = None

    def __post_init__(self) -> None:
        for name in ("deadline_s", "energy_j", "average_power_w", "peak_power_w"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"the limit {name} is {limit!r}, expected a positive finite number")

    @property
    def is_free(self) -> bool:
        return self == Limits()


@dataclass(frozen=True, slots=True)
class Pins:
    """User restrictions of the space; None leaves a choice free.

    `dp` and `tp` fix the stage mesh to (dp, tp) and restrict every op: on the dp axis only batch splits (and
    parameter storage), on the tp axis everything but batch splits.

    Attributes:
        interleave: model chunks per stage (interleaved 1F1B); 1: none.
        sequence: on the tensor axis, what lies between a row-parallel and the next column-parallel product (norms,
            residual sums) is split along the sequence (True) or whole on every rank (False), and nothing else is
            split along the sequence. For a mesh `(dp, tp)`.
        ep, cp: sizes of two more axes between dp and tp. On ep, part of the dp ways to split samples, experts are
            split; on cp, besides the dp ways, positions alone.
        even_cuts: every stage holds equally many of the repeated blocks, whatever the others cost.
        roles: those restrictions on every (dp, tp) mesh, also where a size is free.
        without: labels that no op may take on any axis.
        zero: storage of parameters over ranks that split samples: 0 none, 1 to 3 those stages of ZeRO; None: any but 2.
        ops: (regex, label): on axes longer than one, ops whose name or module path the regex matches whole take the
            label wherever they have it.
        pass_order, num_passes, pass_update: of `ir.passes.Passes`; the others need the first, which asks for passes.
        offload_optimizer, offload_activations: one of `ir.offload.PLACES`; None: they stay on the device.
        meshes: (dp, tp) of every stage, where stages have meshes of their own; (): they are alike.
    """

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    num_microbatches: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    zero: int | None = None
    interleave: int | None = None
    sequence: bool | None = None
    ep: int | None = None
    cp: int | None = None
    even_cuts: bool = False
    roles: bool = False
    without: tuple[str, ...] = ()
    ops: tuple[tuple[str, str], ...] = ()
    pass_order: str | None = None
    num_passes: int | None = None
    pass_update: str | None = None
    meshes: tuple[tuple[int, int], ...] = ()
    offload_optimizer: str | None = None
    offload_activations: str | None = None

    @property
    def offload(self) -> Offload:
        """Both places."""
        return Offload(self.offload_optimizer or NOWHERE, self.offload_activations or NOWHERE)


@dataclass(frozen=True, slots=True)
class StageChoice:
    """Blocks `start..stop-1` on one stage, its devices locked at `clock_hz` (0: left alone).

    `gpu` names their type where the cluster has several; "": there is only one.
    """

    start: int
    stop: int
    recompute: str
    clock_hz: float = 0.0
    gpu: str = ""


@dataclass(frozen=True)
class Alternative:
    """A skeleton that the search looked at: its best figures (formula, not simulated) or why it fell out."""

    description: str
    time_s: float | None
    energy_j: float | None
    objective: float | None
    bound: float | None
    reason: str


@dataclass(frozen=True)
class Decisions:
    """Everything that turns a graph into a distributed program.

    Attributes:
        ops: strategy of every op, by op name.
        hubs: placement in which a value read by several ops is kept, by value name.
        parameters: how each parameter is stored, by value name.
        pace_s: seconds between the starts of two steps at least (an average power cap needs it); 0: no waiting.
        interleave: chunks per pipeline rank: `stages` are then the chunks in order, and rank k of K holds chunks k,
            k + K, ...; 1: every stage is a rank.
        stage_meshes: one per stage, of the same axes in other sizes, `mesh` being the first; (): all have `mesh`. What
            several stages read has one placement, by axis, for all of them.
        passes: over parts of each microbatch behind a switch from data to tensor parallelism; None: in one go.
        offload: what lies outside of the devices.
    """

    mesh: StageMesh
    num_microbatches: int
    schedule: str
    stages: tuple[StageChoice, ...]
    ops: Mapping[str, Strategy]
    hubs: Mapping[str, Sharding]
    parameters: Mapping[str, ParameterStrategy]
    pace_s: float = 0.0
    interleave: int = 1
    stage_meshes: tuple[StageMesh, ...] = field(default=(), metadata=ADDED)
    passes: Passes | None = field(default=None, metadata=ADDED)
    offload: Offload = field(default=Offload(), metadata=ADDED)

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks: stages, or as many as hold all chunks."""
        return len(self.stages) // self.interleave

    @property
    def meshes(self) -> tuple[StageMesh, ...]:
        """Of every pipeline rank."""
        return self.stage_meshes or (self.mesh,) * self.num_ranks

    @property
    def extent(self) -> StageMesh:
        """The axes, each as long as on the stage where it is longest."""
        sizes = [max(own) for own in zip(*(mesh.sizes for mesh in self.meshes), strict=True)]
        return StageMesh(tuple(replace(a, size=size) for a, size in zip(self.mesh.axes, sizes, strict=True)))

    @property
    def num_gpus(self) -> int:
        return sum(mesh.num_devices for mesh in self.meshes)

    def at(self, stage: int) -> Decisions:
        """The decisions as stage (or chunk) `stage` sees them: all on its mesh."""
        return replace(self, mesh=self.stage_meshes[stage], stage_meshes=()) if self.stage_meshes else self

    def split_at_switch(self) -> Decisions:
        """Of a plan with passes: the same without, in whose last two stages the last one is split.

        Raises:
            ValueError: the passes do not begin inside the last stage.
        """
        *others, last = self.stages
        block = -1 if self.passes is None else self.passes.block
        if not last.start < block < last.stop:
            raise ValueError(f"passes begin at block {block}, which is not inside the last stage")
        return replace(self, stages=(*others, replace(last, stop=block), replace(last, start=block)), passes=None)

    def first_gpu(self, rank: int) -> int:
        """The first of the GPUs of a pipeline rank; the others follow."""
        return sum(mesh.num_devices for mesh in self.meshes[:rank])

    def place_of(self, gpu: int) -> tuple[int, int]:
        """Pipeline rank of a GPU, and its place among those of that rank."""
        for rank, mesh in enumerate(self.meshes):
            if gpu < mesh.num_devices:
                return rank, gpu
            gpu -= mesh.num_devices
        raise ValueError(f"the plan has {self.num_gpus} GPUs")


@dataclass(frozen=True)
class Solution:
    """Decisions with their formula values (`ir.pipeline`); the planner re-times them by simulation.

    Attributes:
        time_s, energy_j: pacing included.
        objective_value, bound: in the objective's unit; bound <= optimum of the searched space <= objective_value.
        status: one of STATUSES; `optimal` only if the gap is below the tolerance asked for.
        gap_parts: where a remaining gap comes from.
        contenders: nearly as good plans of other meshes or numbers of stages; simulation may prefer one.
        is_interrupted: the search was stopped by Ctrl-C.
    """

    decisions: Decisions
    time_s: float
    energy_j: float
    objective: Objective
    objective_value: float
    bound: float
    status: str
    solver: str
    wall_s: float
    alternatives: tuple[Alternative, ...] = ()
    gap_parts: Mapping[str, float] = field(default_factory=dict)
    contenders: tuple[Decisions, ...] = ()
    is_interrupted: bool = False

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|, 0 for an objective of 0."""
        return (self.objective_value - self.bound) / abs(self.objective_value) if self.objective_value else 0.0
