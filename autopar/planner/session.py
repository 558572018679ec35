"""Session: a plan at work in this process, one `step` per batch.

In one process the session runs the serial model; under torchrun it runs this rank's part of a plan, which rank 0 makes
(or finds in the cache) and hands to all. Every rank must call the same methods in the same order.

Where another rank is lost or hangs, a method raises NetworkError, which one process of each host has printed. A script
that torchrun starts again then goes on from what `save` wrote, with `resume`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.hosts import DEFAULT_TIMEOUT_S
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.serialize_graph import graph_hash
from autopar.planner.assemble import make_executor, make_serial_executor
from autopar.planner.behind import graph_of_pass, is_updated_in_passes
from autopar.planner.cache import cached_plan
from autopar.planner.execute import run_options
from autopar.planner.request import PlanRequest, choose_target

if TYPE_CHECKING:
    import torch

    from autopar.capture.export import Captured
    from autopar.capture.model_source import ModelSource
    from autopar.runtime.checkpoint import Saver
    from autopar.runtime.checkpoint_store import Position
    from autopar.runtime.executor import Executor
    from autopar.runtime.processes import Membership


@dataclass(frozen=True)
class TrainingOptions:
    """What updates the parameters.

    Attributes:
        optimizer: `adamw` or `sgd`.
        max_norm: clip the norm of all gradients to this; None: no clipping.
        seed: of dropout.
        timeout_s: how long ranks wait for each other in a collective before the run fails.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_norm: float | None = None
    seed: int = 0
    timeout_s: float = DEFAULT_TIMEOUT_S


@dataclass
class Session:
    """One process's part of the training of one model.

    Attributes:
        plan: what is run; None for the serial model.
        executor: of the runtime.
        position: where training stands.
        membership: among the processes that torchrun started; None: alone, or the script has joined them itself.
        savers: by directory and number of checkpoints kept.
    """

    plan: Plan | None
    captured: Captured
    executor: Executor
    position: Position
    membership: Membership | None = None
    savers: dict[tuple[str | Path, int], Saver] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Updates done, those before a `resume` included."""
        return self.position.step

    def step(self, batch: Any) -> float:
        """Forward, backward and update on one whole global batch; the loss, the same on every rank."""
        with self._telling():
            loss = self.executor.step(self._tensors(batch))
        self.position = replace(self.position, step=self.num_steps + 1)
        return loss

    def compute_gradients(self, batch: Any) -> float:
        """Forward and backward alone; `parameters()` then carry their gradients."""
        with self._telling():
            return self.executor.compute_gradients(self._tensors(batch))

    def update(self) -> None:
        """Apply the gradients of `compute_gradients`."""
        with self._telling():
            self.executor.update()
        self.position = replace(self.position, step=self.num_steps + 1)

    def save(self, directory: str | Path, keep: int = 3) -> None:
        """Write a checkpoint of all that training changes, whole or not at all; every rank must call.

        Args:
            directory: of checkpoints, as of `autopar run --checkpoint`.
            keep: how many of the newest stay.
        """
        from autopar.runtime.checkpoint import Saver
        from autopar.runtime.checkpoint_store import CheckpointStore

        with self._telling():
            if (directory, keep) not in self.savers:
                self.savers[directory, keep] = Saver(CheckpointStore(Path(directory), keep), self.captured.aliases)
            self.savers[directory, keep].save(self.executor, self.position)

    def resume(self, directory: str | Path) -> int:
        """Take up the newest whole checkpoint there, whatever plan wrote it; the steps done, 0 where there is none.

        Raises:
            InputError: the checkpoints are of another model, batch or seed, or all are damaged.
        """
        from autopar.runtime.checkpoint_store import CheckpointStore
        from autopar.runtime.resume import take_up

        with self._telling():
            self.position, _ = take_up(self.executor, CheckpointStore(Path(directory)), self.position)
        return self.num_steps

    def _telling(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self.membership is None else self.membership.telling()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """This rank's parameters: DTensors under a plan, plain tensors serially.

        Raises:
            InputError: the plan offloads what the optimizer updates, so that it has no memory here between two steps.
        """
        if self.executor.states is not None and self.executor.states.has_masters:
            place = self.executor.decisions.offload.optimizer
            raise InputError(
                f"the parameters that are updated lie on the {place} (offload_optimizer): save and read them"
            )
        yield from self.executor.store.boundary_parameters()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Over plain tensors that share the memory of `parameters()`, in the same order."""
        return self.executor.optimizer

    def _tensors(self, batch: Any) -> list[torch.Tensor]:
        from autopar.capture.export import tensor_leaves
        from autopar.capture.model_source import as_arguments

        return [tensor for _, tensor in tensor_leaves(*as_arguments(batch))]


def open_session(
    source: ModelSource,
    request: PlanRequest,
    plan: Plan | None = None,
    training: TrainingOptions | None = None,
    reference: ModelReference | None = None,
) -> Session:
    """Start the model here: under torchrun as `plan` (or the best one for so many processes), else serially.

    Raises:
        PlanMismatchError: `plan` was made for another model.
        InputError: torchrun started another number of processes than the plan uses.
    """
    from autopar.runtime.ending import is_torchrun
    from autopar.runtime.processes import join_torchrun

    training = training or TrainingOptions()
    if not is_torchrun():
        return _serial_session(source, request, plan, training)
    membership = join_torchrun(training.timeout_s)
    reference = reference or ModelReference(source.text, dict(source.options), "", 0)
    with contextlib.nullcontext() if membership is None else membership.telling():
        chosen = _agreed_plan(source, request, plan, reference)
        session = _start(source, chosen, training, chosen.model.batch_size, chosen.decisions.num_microbatches)
    session.membership = membership
    return session


def _serial_session(source: ModelSource, request: PlanRequest, plan: Plan | None, training: TrainingOptions) -> Session:
    if plan is None:
        return _start(source, None, training, request.batch_size or source.batch_size, 1)
    _check_model(source, plan)
    return _start(source, plan, training, plan.model.batch_size, plan.decisions.num_microbatches)


def _agreed_plan(source: ModelSource, request: PlanRequest, plan: Plan | None, reference: ModelReference) -> Plan:
    """The plan that all ranks run, priced for the devices they have unless the user named others.

    Rank 0 decides; the others hear of its failure too, instead of waiting.
    """
    import torch.distributed as dist

    from autopar.runtime.agree import decided_by_first
    from autopar.runtime.processes import device_type

    world = dist.get_world_size()

    def decide() -> str | InputError:
        try:
            gpu = request.gpu or ("cpu" if device_type() == "cpu" else None)
            here = replace(request, num_gpus=world, use_all=True, gpu=gpu)
            return dump_plan(_plan_for(source, here, plan, reference))
        except InputError as error:
            return error

    told = decided_by_first(decide)
    if isinstance(told, InputError):
        raise told
    chosen = parse_plan(told)
    if chosen.decisions.num_gpus != world:
        raise InputError(f"the plan uses {chosen.decisions.num_gpus} processes, torchrun started {world}")
    return chosen


def _plan_for(source: ModelSource, request: PlanRequest, plan: Plan | None, reference: ModelReference) -> Plan:
    from autopar.capture.export import capture

    if plan is not None:
        _check_model(source, plan)
        return plan
    graph = capture(source, batch_size=request.batch_size).graph
    return cached_plan(graph, reference, request, choose_target(request))


def _check_model(source: ModelSource, plan: Plan) -> None:
    """Raise PlanMismatchError unless the plan was made for this model and batch."""
    from autopar.capture.export import capture

    found = graph_hash(capture(source, batch_size=plan.model.batch_size).graph)
    if found != plan.model.graph_hash:
        raise PlanMismatchError(
            f"the plan was made for another model or batch: {plan.model.source}, graph {plan.model.graph_hash[:12]}; "
            f"this one is {source.name}, graph {found[:12]}; make the plan again"
        )


def _start(
    source: ModelSource, plan: Plan | None, training: TrainingOptions, batch_size: int, num_microbatches: int
) -> Session:
    """Build the executor: of the plan if this is one of several processes, else of the serial model."""
    from autopar.planner.materialise import capture_for_run
    from autopar.runtime.ending import is_torchrun
    from autopar.runtime.executor import OptimizerOptions, RunOptions, join_plan
    from autopar.runtime.processes import device_name, device_type

    if batch_size % num_microbatches:
        raise InputError(f"a batch of {batch_size} does not divide into {num_microbatches} microbatches")
    size = batch_size // num_microbatches
    captured = capture_for_run(source, batch_size=size, device=device_name(), num_microbatches=num_microbatches)
    state = _state(captured)
    optimizer = OptimizerOptions(training.optimizer, training.learning_rate, training.weight_decay, training.max_norm)
    base = RunOptions(device_name()) if plan is None else run_options(plan, device_name())
    options = replace(base, seed=training.seed, optimizer=optimizer)
    if plan is None or not is_torchrun():
        executor = make_serial_executor(captured.graph, state, options, num_microbatches)
    else:
        mesh = join_plan(captured.graph, plan.decisions, device_type())
        if is_updated_in_passes(plan.decisions):
            raise InputError(
                "the plan updates parameters after each pass (fc_update=pass), but a loop of your own does so once a "
                "step: plan without, or train with 'autopar run'"
            )
        behind = graph_of_pass(plan, source)
        executor = make_executor(captured.graph, plan.decisions, state, mesh, options, behind=behind)
    return Session(plan, captured, executor, _start_of(source, captured, training, batch_size))


def _start_of(source: ModelSource, captured: Captured, training: TrainingOptions, batch_size: int) -> Position:
    """Step 0; the order of samples is the script's own."""
    from autopar.runtime.checkpoint_store import Position

    return Position(
        step=0,
        seed=training.seed,
        data_seed=0,
        batch_size=batch_size,
        optimizer=training.optimizer,
        num_gpus=1,
        source=source.text,
        graph_hash=graph_hash(captured.graph),
    )


def _state(captured: Captured) -> Mapping[str, torch.Tensor]:
    """Parameters, buffers and constants by value name; rank 0's on every rank."""
    import torch.distributed as dist

    values = [v for origin in ("parameter", "buffer", "constant") for v in captured.graph.outside(origin)]
    state = {value.name: captured.tensor(value.name).detach() for value in values}
    if dist.is_initialized():
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        for tensor in state.values():
            dist.broadcast(tensor, src=0)
    return state
