"""The Python interface: `plan`, `parallelize` and `@autoparallel`.

A *model* is given as a file (`"model.py"`, `"hf:config.json"`), as a function that builds it, as an `nn.Module` class
or as an `nn.Module`. For a function or class, `example_batch` (and, if wanted, `loss`) of the module that
defines it are used; for an `nn.Module`, give `example_batch`.

Under torchrun the plan runs distributed over the processes that torchrun started; in one process the serial model
runs. Importing this module imports no torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar, overload

from autopar.errors import InputError
from autopar.ir.cluster import ClusterDescription
from autopar.ir.hosts import DEFAULT_TIMEOUT_S
from autopar.ir.inference import MODE_OPTION, TRAINING, require_training, source_options
from autopar.ir.plan import Plan
from autopar.ir.serialize import load_plan
from autopar.ir.software import PRECISION_OPTION
from autopar.ir.solution import Limits, Objective, Pins
from autopar.planner.detect import choose_gpu
from autopar.planner.objective import Economy, objective_of
from autopar.planner.plan import plan_model, plan_source
from autopar.planner.request import OWN_SOFTWARE, PlanRequest
from autopar.planner.session import Session, TrainingOptions, open_session
from autopar.planner.software import chosen_software
from autopar.planner.sources import source_of, step_source

Model: TypeAlias = Any
"""Source text, builder function, `nn.Module` class or `nn.Module`."""
T = TypeVar("T")


def plan(
    model: Model,
    *,
    gpus: int,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    memory_bytes: int | None = None,
    network_bytes_per_s: float | None = None,
    objective: str | Objective = "time",
    batch_size: int | None = None,
    options: Mapping[str, str] | None = None,
    example_batch: Any = None,
    pins: Pins | None = None,
    constraints: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    gpu_hour_price: float | None = None,
    energy_price: float | None = None,
    use_all: bool = False,
    clocks: str = "auto",
    precision: str | None = None,
    cluster: ClusterDescription | None = None,
    time_limit_s: float | None = None,
    mode: str = TRAINING,
) -> Plan:
    """Plan a model for up to `gpus` GPUs.

    Args:
        model: see the module docstring.
        gpus: ceiling on the number of GPUs; not read with `cluster`.
        cluster: groups of several types of GPU, in place of `gpu`, `gpus_per_node` and `memory_bytes`.
        gpu, network_bytes_per_s: a device (`autopar gpus`; None: this machine's) and a node's ports (None: as usual).
        options, example_batch: of a source file, as text, like `--set`; of an `nn.Module`: a tensor, tuple or dict.
        constraints: regex -> label: ops whose name or module path it matches whole take the label, as `op:` of --pin.
        limits: deadline, energy budget and power caps of a step.
        clocks: `auto`: the plan may lock GPU clocks; `max`: it leaves them alone.
        precision: `bf16`: of a source file's model, beside a float32 copy; None: the model's own.
        mode: `training`, or `inference`: the model of a source file is run forward alone.
        gpu_hour_price, energy_price: for the objective `cost`: per GPU and hour, and per kWh.

    Raises:
        InputError, CaptureError, InfeasibleError: the model or an argument is wrong; no plan fits.
    """
    request = PlanRequest(
        num_gpus=gpus if cluster is None else cluster.num_gpus,
        cluster=cluster,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        memory_bytes=memory_bytes,
        network_bytes_per_s=network_bytes_per_s,
        objective=_objective(objective, gpu_hour_price, energy_price),
        limits=limits or Limits(),
        pins=replace(pins or Pins(), ops=((pins or Pins()).ops + tuple((constraints or {}).items()))),
        batch_size=batch_size,
        use_all=use_all,
        clocks=clocks,
        time_limit_s=time_limit_s,
        software=chosen_software(OWN_SOFTWARE, {}, precision),
    )
    return _planned(model, {**(options or {}), **source_options(mode, precision)}, example_batch, request)


def _planned(model: Model, options: Mapping[str, str], example_batch: Any, request: PlanRequest) -> Plan:
    if isinstance(model, str):
        return plan_model(model, options, request)
    for option, name in ((PRECISION_OPTION, "a precision"), (MODE_OPTION, "inference")):
        if option in options:
            raise InputError(f"{name} is for a model of a source file, which other processes can build again")
    source = source_of(model, example_batch)
    return plan_source(source, request, name=source.text).plan


def parallelize(
    model: Model,
    plan: Plan | str | None = None,
    *,
    objective: str | Objective = "time",
    gpu: str | None = None,
    options: Mapping[str, str] | None = None,
    example_batch: Any = None,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    max_norm: float | None = None,
    seed: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Session:
    """Make a model ready to train: `step(batch) -> loss`, `parameters()`, `optimizer`, `save` and `resume`.

    Args:
        model: see the module docstring.
        plan: a plan or its file, whose precision the model takes; None: the best plan for torchrun's processes.
        objective, gpu: for the plan that is made if none is given; `gpu` None: what this machine has.
        optimizer: `adamw` or `sgd`.
        timeout_s: how long ranks wait for each other in a collective before the run fails.
    """
    settings = getattr(model, "__autopar__", {})
    request = _request_here({"objective": _objective(objective), "gpu": gpu} | settings)
    training = TrainingOptions(optimizer, learning_rate, weight_decay, max_norm, seed, timeout_s)
    chosen = load_plan(plan) if isinstance(plan, str) else plan
    if chosen is not None:
        require_training(chosen, "a training loop")
    precision = None if chosen is None else chosen.model.options.get(PRECISION_OPTION)
    return open_session(source_of(model, example_batch, options, precision), request, chosen, training)


@overload
def autoparallel(target: T) -> T: ...
@overload
def autoparallel(
    target: None = None,
    *,
    gpus: int | None = ...,
    gpu: str | None = ...,
    objective: str | Objective = ...,
    optimizer: str = ...,
    learning_rate: float = ...,
    weight_decay: float = ...,
    max_norm: float | None = ...,
    timeout_s: float = ...,
) -> Callable[[T], T]: ...
def autoparallel(
    target: Any = None,
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    objective: str | Objective = "time",
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    max_norm: float | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Any:
    """Mark what is to be parallelised.

    On an `nn.Module` class, or a function without required parameters that builds a model: the object itself, marked
    for `autopar plan FILE` and `parallelize`.

    On a train-step function `train_step(model, batch) -> loss`: each call does forward, backward and update on the
    whole global batch and returns the loss as a number. Under torchrun that runs the plan, in one process the
    serial model. The model gives the initial values; `train_step.session` holds the trained ones.

    `train_step.resume(model, batch, directory)` before the first step takes up what `train_step.save(directory)` wrote
    and returns the steps that are done, 0 at first: what a script begins with that torchrun may start again.

    Args:
        gpus: for `autopar plan`: ceiling on the number of GPUs. torchrun's number of processes always wins.
        timeout_s: how long ranks wait for each other in a collective before the run fails.
    """
    if target is None:
        return functools.partial(
            autoparallel,
            gpus=gpus,
            gpu=gpu,
            objective=objective,
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_norm=max_norm,
            timeout_s=timeout_s,
        )
    settings = {"num_gpus": gpus or 1, "gpu": gpu, "objective": _objective(objective)}
    if inspect.isclass(target) or not _required_parameters(target):
        target.__autopar__ = settings
        return target
    training = TrainingOptions(optimizer, learning_rate, weight_decay, max_norm, timeout_s=timeout_s)
    return TrainStep(target, settings, training)


class TrainStep:
    """A decorated train step; the first call plans and starts, every call trains on one batch."""

    def __init__(
        self, function: Callable[[Any, Any], Any], settings: Mapping[str, Any], training: TrainingOptions
    ) -> None:
        functools.update_wrapper(self, function)
        self.__autopar__ = settings
        self.session: Session | None = None
        self._function = function
        self._training = training
        self._model: Any = None

    def __call__(self, model: Any, batch: Any) -> float:
        """One step; the loss before the update.

        Raises:
            InputError: another model than in the first call.
            NetworkError: another rank is lost or hangs.
        """
        return self._session_of(model, batch).step(batch)

    def resume(self, model: Any, batch: Any, directory: str) -> int:
        """Take up the newest checkpoint there; the steps done, 0 where there is none. See `Session.resume`."""
        return self._session_of(model, batch).resume(directory)

    def save(self, directory: str, keep: int = 3) -> None:
        """Write a checkpoint; see `Session.save`. Raises InputError before the first step."""
        if self.session is None:
            raise InputError(f"{self._function.__name__} has not started: nothing to save before its first step")
        self.session.save(directory, keep)

    def _session_of(self, model: Any, batch: Any) -> Session:
        if self.session is None:
            source = step_source(self._function, model, batch)
            self.session, self._model = (
                open_session(source, _request_here(self.__autopar__), None, self._training),
                model,
            )
        if model is not self._model:
            raise InputError(
                f"{self._function.__name__} was started with another model; decorate one function per model"
            )
        return self.session


def _request_here(settings: Mapping[str, Any]) -> PlanRequest:
    """The request for a run on this machine: without a named GPU, the one found here, else the CPU."""
    gpu = settings["gpu"]
    if gpu is None and choose_gpu(None).origin != "detected":
        gpu = "cpu"
    return PlanRequest(**{"num_gpus": 1, **settings, "gpu": gpu})


def _objective(
    objective: str | Objective, gpu_hour_price: float | None = None, energy_price: float | None = None
) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective in ("cost", "carbon"):
        return objective_of(objective, Economy(gpu_hour_price=gpu_hour_price, energy_price=energy_price))
    try:
        return Objective(objective)
    except ValueError as error:
        raise InputError(str(error)) from error


def _required_parameters(function: Callable[..., Any]) -> list[str]:
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
