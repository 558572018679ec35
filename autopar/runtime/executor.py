"""Executor: training steps of a plan on one rank.

A step begins no sooner than the plan's pace allows. It runs M microbatches forward and backward (a plain loop on one
stage, else a schedule of `torch.distributed.pipelining`), then finishes the gradients, clips, and updates. Its loss is
the mean over microbatches. A rank of an interleaved pipeline has several stage programs over one set of parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.offload import LEAST_BYTES, NOWHERE
from autopar.ir.partition import partition
from autopar.ir.passes import EACH_PASS
from autopar.ir.pipeline import effective_schedule, splits_backward
from autopar.ir.solution import Decisions
from autopar.program.stage import BoundaryTensor, StageProgram
from autopar.runtime.activations import OffloadedActivations
from autopar.runtime.buckets import BUCKET_BYTES
from autopar.runtime.lean_stage import LeanStage, ReshardingStage
from autopar.runtime.mesh import RankMesh, join_mesh, join_meshes, serial_mesh
from autopar.runtime.microbatches import split_batch
from autopar.runtime.pace import Pacer
from autopar.runtime.parameters import ParameterStore, StoredParameter, tied_stages
from autopar.runtime.passes import PassRunner
from autopar.runtime.places import make_place
from autopar.runtime.resharding import make_cut
from autopar.runtime.stage_runner import StageRunner
from autopar.runtime.states import OffloadedStates
from autopar.torch_adapter import dtype_of


@dataclass(frozen=True)
class OptimizerOptions:
    """What updates the parameters.

    Attributes:
        kind: `adamw` or `sgd`.
        max_norm: clip the norm of all gradients to this; None: no clipping.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_norm: float | None = None


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Attributes:
        device: `cpu` or `cuda:<index>`.
        seed: of the random streams.
        overlap_gradients: sum gradients over ranks while backward still runs.
        prefetch_parameters: gather the parameters of a block while its neighbour computes.
        bucket_bytes: of parameters whose gradients are summed together, at most.
        master: dtype of the copy of narrower parameters that the optimizer updates; "": it updates the parameters.
        compile: backend of `torch.compile` that stages go through; "": they run as they are.
        offload_directory: for what the plan offloads to disk; "": where temporary files go.
        offload_least_bytes: of memory that autograd saves, to be offloaded.
    """

    device: str = "cpu"
    seed: int = 0
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    overlap_gradients: bool = False
    prefetch_parameters: bool = False
    bucket_bytes: float = BUCKET_BYTES
    master: str = ""
    compile: str = ""
    offload_directory: str = ""
    offload_least_bytes: int = LEAST_BYTES


@dataclass(frozen=True)
class _StepLoss:
    """The mean loss of a step, perhaps still on its way from the stage that knows it."""

    total: Tensor
    work: dist.Work | None = None

    def value(self) -> float:
        """Waits for it."""
        if self.work is not None:
            self.work.wait()
        return float(self.total)


class Executor:
    """One rank of a run."""

    def __init__(
        self,
        graph: OpGraph,
        decisions: Decisions,
        programs: Sequence[StageProgram],
        state: Mapping[str, Tensor],
        *,
        mesh: RankMesh,
        options: RunOptions,
    ) -> None:
        """Take the rank's parts of the state.

        Args:
            graph: captured at the microbatch size.
            decisions: of the plan.
            programs: of this rank's stages in order, for these decisions, on the mesh's axes.
            state: whole parameters, buffers and constants by value name, equal on all ranks.
            mesh: from `join_plan` or `serial_mesh`.
            options: of the run; its device is that of the programs.
        """
        self.options = options
        self.graph, self.decisions, self.programs, self.mesh = graph, decisions, tuple(programs), mesh
        device = self.options.device
        values = [v for v in graph.parameters if any(v.name in program.parameters for program in programs)]
        self.store = ParameterStore(
            values,
            decisions.parameters,
            state,
            mesh=mesh,
            tied=_tied(graph, decisions),
            device=device,
            bucket_bytes=options.bucket_bytes,
            master=dtype_of(options.master) if options.master else None,
        )
        readers = Counter(name for program in programs for name in program.parameters)
        for behind in (program.behind for program in programs if program.behind is not None):
            readers |= dict.fromkeys(behind.program.parameters, behind.passes.count)
        self.store.sum_early(readers)
        if options.overlap_gradients:
            self.store.overlap({name: decisions.num_microbatches * count for name, count in readers.items()})
        self._buffers = [
            {name: state[name].detach().clone().to(device) for name in (*program.buffers, *program.constants)}
            for program in programs
        ]
        for program in self.programs:
            program.scope.deferred = self.store.complete_leaves()
        self.runners = [
            self._make_runner(program, buffers | self.store.leaves)
            for program, buffers in zip(programs, self._buffers, strict=True)
        ]
        self.states = self._offloaded_states()
        groups = [self.store.updated_parameters()] if self.states is None else self.states.groups
        self.optimizer = _make_optimizer(groups, self.options.optimizer)
        self._pacer = Pacer(decisions.pace_s)
        self._schedule = _make_schedule(self.runners, decisions, mesh, device, _loss(graph)) if mesh.pipeline else None

    def _make_runner(self, program: StageProgram, state: Mapping[str, Tensor]) -> StageRunner:
        behind = None
        if program.behind is not None:
            behind = PassRunner(
                program.behind,
                state,
                self.graph.outside("input"),
                num_microbatches=self.decisions.num_microbatches,
                samples=self.graph.batch_size,
                update=self._update_behind if program.behind.passes.update == EACH_PASS else None,
            )
        prefetch = self.options.prefetch_parameters
        return StageRunner(program, state, prefetch=prefetch, activations=self._activations(), behind=behind)

    def _update_behind(self) -> None:
        """Update the parameters that have gradients between two passes: those behind the switch."""
        behind = self.programs[-1].behind
        assert behind is not None
        with self.store.complete(behind.program.parameters):
            self.optimizer.step()

    def _activations(self) -> OffloadedActivations | None:
        """Where a stage keeps what autograd saves; None: on the device."""
        options, place = self.options, self.decisions.offload.activations
        if place == NOWHERE:
            return None
        if options.compile:
            raise InputError(
                "what a compiled stage saves cannot be taken from it: run without --compile, or plan again"
            )
        made = make_place(place, options.device, options.offload_directory)
        return OffloadedActivations(made, options.device, options.offload_least_bytes)

    def _offloaded_states(self) -> OffloadedStates | None:
        """Where the optimizer's states lie; None: on the device."""
        options, place = self.options, self.decisions.offload.optimizer
        if place == NOWHERE:
            return None
        made = make_place(place, options.device, options.offload_directory)
        return OffloadedStates(self.store, options.optimizer.kind, made)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers and constants by value name, as the last of the rank's stages that updates one has it."""
        found: dict[str, Tensor] = {}
        for program, buffers in zip(self.programs, self._buffers, strict=True):
            found |= {name: x for name, x in buffers.items() if name not in found or name in program.updated_buffers}
        return found

    @property
    def draws_random(self) -> bool:
        """Some op of the rank draws random numbers."""
        return any(program.draws_random for program in self.programs)

    @property
    def updated_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that some stage of the rank updates."""
        return tuple(dict.fromkeys(name for program in self.programs for name in program.updated_buffers))

    def step(self, batch: Sequence[Tensor]) -> float:
        """One training step; the mean loss of its microbatches, on every rank.

        Args:
            batch: the whole global batch, one tensor per batch input of the graph in graph order, on any device.
        """
        loss = self._compute(batch)
        self._update()
        return loss.value()

    def compute_gradients(self, batch: Sequence[Tensor]) -> float:
        """Forward and backward of all microbatches; gradients are finished but nothing is updated."""
        loss = self._compute(batch)
        self.store.expose_gradients()
        return loss.value()

    def _compute(self, batch: Sequence[Tensor]) -> _StepLoss:
        self._pacer.wait()
        self.store.zero_gradients()
        microbatches = split_batch(
            self.graph.outside("input"),
            self.decisions.num_microbatches,
            [tensor.to(self.options.device) for tensor in batch],
        )
        for runner in self.runners:
            runner.feed(microbatches)
        losses = self._run_pipelined() if self._schedule is not None else self._run_loop()
        for program in self.programs:
            program.scope.finish()
            for stream in program.streams:
                stream.step += 1
        self.store.sync_gradients()
        return self._begin_mean(losses)

    def update(self) -> None:
        """Clip and apply the gradients of `compute_gradients`."""
        self.store.take_gradients()
        self._update()

    def _update(self) -> None:
        self.clip_gradients()
        if self.states is not None:
            self.states.step(self.optimizer)
            return
        self.optimizer.step()
        self.store.after_update()

    def updated_value(self, item: StoredParameter) -> Tensor:
        """What the optimizer updates of a parameter, wherever it lies."""
        return item.updated.detach() if self.states is None else self.states.value(item)

    def empty_state(self, item: StoredParameter, name: str) -> Tensor:
        """Room for a state of the optimizer that is as large as its parameter, to be filled and to stay."""
        home = None if self.states is None else self.states.state(item.updated, name)
        return torch.zeros_like(item.updated).detach() if home is None else home

    def refresh_leaves(self) -> None:
        """After the state has been loaded: what computes follows what the optimizer updates."""
        if self.states is not None:
            self.states.refresh_leaves()
        else:
            self.store.after_update()

    def _run_loop(self) -> list[Tensor]:
        losses = []
        (runner,) = self.runners
        for _ in range(self.decisions.num_microbatches):
            loss = runner()
            (loss / self.decisions.num_microbatches).backward()
            losses.append(loss.detach())
        return losses

    def _run_pipelined(self) -> list[Tensor]:
        assert self._schedule is not None
        losses: list[Tensor] = []
        if self.programs[-1].is_last:
            # The engine wants a target per microbatch; the loss is part of the stage, so nothing is in them.
            target = torch.zeros(self.decisions.num_microbatches)
            self._schedule.step(target=target, losses=losses, return_outputs=False)
        else:
            self._schedule.step()
        return [loss.detach() * self.decisions.num_microbatches for loss in losses]

    def _begin_mean(self, losses: Sequence[Tensor]) -> _StepLoss:
        """A stage that is done updates its parameters while earlier ones still run backward."""
        total = torch.stack(list(losses)).double().mean() if losses else torch.zeros((), dtype=torch.float64)
        total = total.to(self.options.device)
        if self.mesh.pipeline is None:
            return _StepLoss(total)
        if self.mesh.meshes and self.mesh.rank_in_stage:
            total.zero_()  # The first rank of the last stage speaks for it.
        group = None if self.mesh.meshes else self.mesh.pipeline
        return _StepLoss(total, dist.all_reduce(total, group=group, async_op=True))

    def clip_gradients(self) -> float | None:
        """Scale all gradients so that their common norm is at most `max_norm`; the norm before, None without a limit.

        As `torch.nn.utils.clip_grad_norm_` on one device; every rank must call.
        """
        limit = self.options.optimizer.max_norm
        if limit is None:
            return None
        squared = self.store.squared_norm().to(self.options.device)
        if not self.mesh.is_alone:
            dist.all_reduce(squared)
        norm = float(squared.sqrt())
        factor = limit / (norm + 1e-6)
        if factor < 1:
            for parameter in self.store.updated_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return norm

    def sync_buffers(self) -> None:
        """Bring buffers that only some stages update to all stages that read them; every rank must call."""
        if self.mesh.pipeline is None:
            return
        parts = partition(self.graph, self.decisions.stages)
        for value in self.graph.outside("buffer"):
            owners = [k for k, part in enumerate(parts) if any(value.name in op.mutates for op in part.ops)]
            if not owners:
                continue
            tensor = self.buffers.get(value.name)
            if tensor is None:
                dtype = dtype_of(value.meta.dtype)
                tensor = torch.zeros(value.meta.shape, dtype=dtype, device=self.options.device)
                self._buffers[0][value.name] = tensor
            self._broadcast(tensor, owners[-1] % self.mesh.num_stages)
            for copies in self._buffers:
                if value.name in copies and copies[value.name] is not tensor:
                    copies[value.name].copy_(tensor)

    def _broadcast(self, tensor: Tensor, stage: int) -> None:
        """From a stage to all others."""
        if self.mesh.meshes:
            dist.broadcast(tensor, self.mesh.first_rank(stage))
        else:
            dist.broadcast(tensor, group_src=stage, group=self.mesh.pipeline)


def join_plan(graph: OpGraph, decisions: Decisions, device_type: str) -> RankMesh:
    """Process groups for a plan; `torch.distributed` must be initialised unless the plan uses one device."""
    if decisions.num_gpus == 1 and not dist.is_initialized():
        return serial_mesh()
    ranks = set(_tied(graph, decisions).values())
    if decisions.stage_meshes:
        return join_meshes(decisions.stage_meshes, device_type, ranks)
    return join_mesh(decisions.mesh, decisions.num_ranks, device_type, ranks)


def _tied(graph: OpGraph, decisions: Decisions) -> dict[str, tuple[int, ...]]:
    """Pipeline ranks that read a parameter, for parameters that several read."""
    parts, num_ranks = partition(graph, decisions.stages), decisions.num_ranks
    read = [{name for part in parts[rank::num_ranks] for name in part.outside} for rank in range(num_ranks)]
    return tied_stages([[v.name for v in graph.parameters if v.name in names] for names in read])


def _make_optimizer(groups: Sequence[list[nn.Parameter]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Over plain tensors and in one kernel: DTensors would cost a dispatch of each op on each parameter."""
    parameters = [{"params": group or [nn.Parameter(torch.zeros(()))]} for group in groups or [[]]]
    if options.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    if options.kind == "sgd":
        return torch.optim.SGD(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    raise InputError(f"unknown optimizer {options.kind!r}: adamw or sgd")


def _loss(graph: OpGraph) -> BoundaryTensor:
    dtype = graph.values[graph.loss].meta.dtype if graph.loss else "float32"
    return BoundaryTensor("loss", (), dtype, requires_grad=True)


def _make_schedule(
    runners: Sequence[StageRunner], decisions: Decisions, mesh: RankMesh, device: str, loss: BoundaryTensor
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """The engine's schedule over static shapes."""
    count = decisions.num_microbatches
    stages = [_make_stage(runner, mesh, device, loss) for runner in runners]

    def mean_loss(loss: Tensor, _: Tensor) -> Tensor:
        return loss / count

    if splits_backward(decisions.schedule, mesh.num_stages):
        for stage, runner in zip(stages, runners, strict=True):
            stage.dw_builder = runner.program.delayed.take
        return ScheduleInterleavedZeroBubble(list(stages), count, loss_fn=mean_loss, scale_grads=False)
    if decisions.interleave > 1:
        return ScheduleInterleaved1F1B(list(stages), count, loss_fn=mean_loss, scale_grads=False)
    runs = effective_schedule(decisions.schedule, mesh.num_stages, count)
    kind = Schedule1F1B if runs == "1f1b" else ScheduleGPipe
    return kind(stages[0], count, loss_fn=mean_loss, scale_grads=False)


def _make_stage(runner: StageRunner, mesh: RankMesh, device: str, loss: BoundaryTensor) -> PipelineStage:
    program = runner.program
    place = (runner, program.stage, program.num_stages, torch.device(device))
    settings: dict[str, Any] = {
        "input_args": _examples(program.received),
        "output_args": _examples((loss,) if program.is_last else program.sent),
        "group": mesh.pipeline,
    }
    if not mesh.meshes:
        return LeanStage(*place, **settings)
    before = make_cut(mesh, program.stage - 1, program.received) if program.stage else None
    after = None if program.is_last else make_cut(mesh, program.stage, program.sent)
    return ReshardingStage(*place, before=before, after=after, **settings)


def _examples(tensors: Sequence[BoundaryTensor]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(t.shape, dtype=dtype_of(t.dtype), device="meta", requires_grad=t.requires_grad) for t in tensors
    )
