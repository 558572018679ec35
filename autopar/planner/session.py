"""Session: a plan at work in this process, one `step` per batch.

In one process the session runs the serial model; under torchrun it runs this rank's part of a plan, which rank 0 makes
(or finds in the cache) and hands to all. Every rank must call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.plan import ModelReference, Plan
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.ir.serialize_graph import graph_hash
from autopar.planner.assemble import make_executor, make_serial_executor
from autopar.planner.cache import cached_plan
from autopar.planner.execute import run_options
from autopar.planner.request import PlanRequest, choose_target

if TYPE_CHECKING:
    import torch

    from autopar.capture.export import Captured
    from autopar.capture.model_source import ModelSource
    from autopar.runtime.executor import Executor


@dataclass(frozen=True)
class TrainingOptions:
    """What updates the parameters.

    Attributes:
        optimizer: `adamw` or `sgd`.
        max_norm: clip the norm of all gradients to this; None: no clipping.
        seed: of dropout.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    max_norm: float | None = None
    seed: int = 0


@dataclass
class Session:
    """One process's part of the training of one model.

    Attributes:
        plan: what is run; None for the serial model.
        executor: of the runtime.
    """

    plan: Plan | None
    captured: Captured
    executor: Executor

    def step(self, batch: Any) -> float:
        """Forward, backward and update on one whole global batch; the loss, the same on every rank."""
        return self.executor.step(self._tensors(batch))

    def compute_gradients(self, batch: Any) -> float:
        """Forward and backward alone; `parameters()` then carry their gradients."""
        return self.executor.compute_gradients(self._tensors(batch))

    def update(self) -> None:
        """Apply the gradients of `compute_gradients`."""
        self.executor.update()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """This rank's parameters: DTensors under a plan, plain tensors serially."""
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
    join_torchrun()
    chosen = _agreed_plan(source, request, plan, reference or ModelReference(source.text, dict(source.options), "", 0))
    return _start(source, chosen, training, chosen.model.batch_size, chosen.decisions.num_microbatches)


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

    from autopar.runtime.processes import device_type

    world = dist.get_world_size()
    told: list[str | InputError | None] = [None]
    if dist.get_rank() == 0:
        try:
            gpu = request.gpu or ("cpu" if device_type() == "cpu" else None)
            here = replace(request, num_gpus=world, use_all=True, gpu=gpu)
            told = [dump_plan(_plan_for(source, here, plan, reference))]
        except InputError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], InputError):
        raise told[0]
    chosen = parse_plan(str(told[0]))
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
        executor = make_executor(captured.graph, plan.decisions, state, mesh, options)
    return Session(plan, captured, executor)


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
