"""Executing plans: `run_plan` trains for some steps, `verify_plan` compares one step with the serial model.

Under torchrun the processes are there already; else local ones are started. Workers build the model themselves, from
the plan's source, with seed 0 on every rank, and capture it at the microbatch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from autopar.clocks.hold import Held
from autopar.errors import InputError, VerifyError
from autopar.ir.graph import OpGraph
from autopar.ir.hosts import Hosts
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.run import RunSettings
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.meters import node_reading
from autopar.planner.again import plan_for_world
from autopar.planner.assemble import input_form, make_executor, make_serial_executor
from autopar.planner.behind import (
    LEARNING_RATE,
    SerialStep,
    check_settings,
    compare_updates,
    graph_of_pass,
    is_updated_in_passes,
    updates_words,
)
from autopar.planner.clock_file import switched_clocks
from autopar.planner.run_energy import RunEnergy, Window, run_energy
from autopar.planner.same_model import check_names, check_same_model
from autopar.planner.settings import BoardSettings, held_boards, node_ranks, switching_of

if TYPE_CHECKING:
    import torch

    from autopar.capture.export import Captured
    from autopar.capture.source import ModelSource
    from autopar.runtime.checkpoint_store import Position
    from autopar.runtime.executor import Executor, RunOptions

SEED = 0
"""Of the weights, the example batch and the random streams."""
COMPILER = "inductor"
"""Backend of `torch.compile` for plans that are priced with compiled stages."""
FLOAT64_TOLERANCE = 1e-10
EAGER_TOLERANCE = 1e-4
"""Largest relative error of loss and gradients between the captured graph and the eager model in its own dtype."""


@dataclass(frozen=True)
class VerifyReport:
    """How far the distributed program is from the serial one.

    Attributes:
        dtype, tolerance: of the comparison; errors are relative.
        worst_parameter: whose gradient has the largest error.
        eager_error: the captured graph against the user's eager model in its own dtype; None where that cannot be
            compared because the model draws random numbers.
        updates: what is updated within the step, of which the change is compared in place of the gradient; "": nothing.
    """

    num_processes: int
    dtype: str
    tolerance: float
    serial_loss: float
    distributed_loss: float
    loss_error: float
    worst_parameter: str
    worst_gradient_error: float
    num_parameters: int
    eager_error: float | None
    updates: str = ""

    def __str__(self) -> str:
        eager = "not compared (random numbers)" if self.eager_error is None else f"differs by {self.eager_error:.1e}"
        return "\n".join(
            [
                f"verified on {self.num_processes} processes in {self.dtype}, tolerance {self.tolerance:.0e}",
                f"  loss       serial {self.serial_loss:.12g}, distributed {self.distributed_loss:.12g}, "
                f"error {self.loss_error:.1e}",
                f"  gradients  {self.num_parameters} parameters, largest error {self.worst_gradient_error:.1e}"
                + (f" in {self.worst_parameter}" if self.worst_parameter else ""),
                *([f"  updates    {self.updates}"] if self.updates else []),
                f"  capture    against the eager model: {eager}",
            ]
        )


@dataclass(frozen=True)
class RunReport:
    """What a run measured.

    Attributes:
        losses: of every step, before its update.
        step_time: median over the steps after the first, with the range seen.
        energy: of the average step over all devices, with its parts and the label of where each comes from.
        held: clocks and power limits that were set meanwhile, and what was not.
        first_step: done before, by a run whose checkpoint was taken up.
        straggler: rank that made the others wait, and how many times slower than they it was (measured); None: none.
    """

    num_processes: int
    losses: tuple[float, ...]
    step_time: Quantity
    energy: RunEnergy
    notes: tuple[str, ...]
    held: Held
    first_step: int = 0
    straggler: tuple[int, float] | None = None

    def __str__(self) -> str:
        time = self.step_time
        before = f" after {self.first_step} done before" if self.first_step else ""
        lines = [
            f"{len(self.losses)} steps{before} on {self.num_processes} processes{self._loss_words}",
            f"  step time  {time.value:.4g} s ({time.low:.4g} to {time.high:.4g}), {time.label}",
            f"  energy     {self.energy.total.value:.4g} J per step, {self.energy.total.label}: {self.energy.text}",
        ]
        notes = (*self.notes, *self.energy.notes, *self.held.notes)
        return "\n".join([*lines, *(f"  note: {note}" for note in notes), *(f"    {c}" for c in self.held.commands)])

    @property
    def _loss_words(self) -> str:
        return f": loss {self.losses[0]:.6g} -> {self.losses[-1]:.6g}" if self.losses else ""


def verify_plan(
    plan: Plan,
    *,
    dtype: str = "float64",
    tolerance: float = FLOAT64_TOLERANCE,
    hosts: Hosts | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Run one step of the plan and of the serial model on the same batch and compare loss and every gradient.

    Args:
        dtype, tolerance: of the comparison.
        hosts: that take part, each of which must call this and gets the same report; None: this one alone.

    Raises:
        VerifyError: they disagree.
        PlanMismatchError: the plan was made for another model.
        NetworkError: ranks did not meet, or lost each other.
        WorkerError: a process died.
    """
    arguments = {"plan": dump_plan(plan), "dtype": dtype, "tolerance": tolerance}
    report = VerifyReport(**on_all_ranks(verify_worker, arguments, plan.decisions.num_gpus, progress, hosts))
    disagreements = [
        f"{what} differs by {error:.3e} (tolerance {limit:.0e})"
        for what, error, limit in (
            ("the loss", report.loss_error, tolerance),
            (f"the gradient of {report.worst_parameter}", report.worst_gradient_error, tolerance),
            ("the captured graph against the eager model", report.eager_error or 0.0, EAGER_TOLERANCE),
        )
        if not error <= limit
    ]
    if disagreements:
        raise VerifyError("the plan does not compute what the serial model computes: " + "; ".join(disagreements))
    return report


def run_plan(
    plan: Plan,
    settings: RunSettings | None = None,
    *,
    boards: BoardSettings | None = None,
    hosts: Hosts | None = None,
    progress: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunReport:
    """Train for some steps, on the model file's data where it has some; see `recover` for a run that survives.

    Args:
        settings: of the run.
        boards: what to set on this host's GPUs meanwhile.
        hosts: that take part, each of which must call this; None: this one alone.
        environment: variables of the workers besides this process's own.

    Raises:
        PlanMismatchError: the plan was made for another model.
        NetworkError: ranks did not meet, or lost each other.
        WorkerError: a process died.
    """
    settings = settings or RunSettings()
    check_settings(plan, settings)
    settings.check_offload(plan.decisions.offload)
    arguments: dict[str, Any] = {"plan": dump_plan(plan), "settings": asdict(settings)}
    num_processes = plan.decisions.num_gpus
    boards, ranks = boards or BoardSettings(), node_ranks(num_processes, hosts or Hosts())
    with held_boards(plan, boards, ranks, progress) as held:
        arguments["switching"] = switching_of(plan, boards, held, ranks)
        found = on_all_ranks(run_worker, arguments, num_processes, progress, hosts, environment=environment)
    step_time, window = Quantity(**found["step_time"]), found["window"]
    reading = None if window["reading"] is None else node_reading(window["reading"])
    return RunReport(
        num_processes=found["num_processes"],
        losses=tuple(found["losses"]),
        step_time=step_time,
        energy=run_energy(plan, Window(**{**window, "reading": reading, "step_time": step_time})),
        notes=tuple(found["notes"]),
        held=held,
        first_step=found["first_step"],
        straggler=None if found["straggler"] is None else (found["straggler"]["rank"], found["straggler"]["factor"]),
    )


def on_all_ranks(
    worker: Callable[[Mapping[str, Any]], dict[str, Any]],
    arguments: Mapping[str, Any],
    num_processes: int,
    progress: Callable[[str], None] | None,
    hosts: Hosts | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Result of a worker function of a module, of this host's first rank (under torchrun: of this rank)."""
    from autopar.runtime.ending import is_torchrun
    from autopar.runtime.launch import Job, launch_local
    from autopar.runtime.processes import join_torchrun

    hosts = hosts or Hosts()
    if is_torchrun():
        if hosts.num_nodes > 1:
            raise InputError("--nodes is for runs without torchrun, which has started the processes already")
        membership = join_torchrun(hosts.timeout_s)
        with contextlib.nullcontext() if membership is None else membership.telling():
            return worker(arguments)
    if progress is not None:
        ranks = hosts.local_ranks(num_processes)
        others = f" ({ranks[0]} to {ranks[-1]} of {num_processes}, at {hosts.where})" if hosts.num_nodes > 1 else ""
        progress(f"starting {len(ranks)} local processes{others}")
    job = Job(
        f"{worker.__module__}:{worker.__name__}",
        arguments,
        num_processes,
        environment or {},
        is_stepwise=worker is run_worker,
    )
    results: list[dict[str, Any]] = launch_local(job, hosts=hosts, on_line=progress)
    return results[0]


@dataclass(frozen=True)
class Prepared:
    """A plan's model in this process.

    Attributes:
        captured: at the microbatch size, in the model's own dtype.
        batch: whole global batch in graph order.
        state: parameters, buffers and constants by value name, equal on all ranks.
        behind: the graph at the size of a pass, of a plan with passes; else None.
    """

    plan: Plan
    source: ModelSource
    captured: Captured
    batch: tuple[torch.Tensor, ...]
    state: Mapping[str, torch.Tensor]
    behind: OpGraph | None = None


def prepare(plan: Plan, device: str) -> Prepared:
    """Build, capture and check the plan's model.

    Raises:
        PlanMismatchError: the model is not the one that the plan was made for.
        InputError: the batch does not divide into the plan's microbatches.
    """
    import torch

    from autopar.capture.source import load_source
    from autopar.planner.materialise import capture_for_run, sized_batch

    batch_size, count = plan.model.batch_size, plan.decisions.num_microbatches
    if batch_size % count:
        raise InputError(f"a batch of {batch_size} does not divide into {count} microbatches")
    source = load_source(plan.model.source, plan.model.options)
    torch.manual_seed(SEED)
    captured = capture_for_run(source, batch_size=batch_size // count, device=device, num_microbatches=count)
    check_same_model(plan, captured.graph, source)
    torch.manual_seed(SEED + 1)
    batch = sized_batch(source, batch_size, device)
    values = [v for origin in ("parameter", "buffer", "constant") for v in captured.graph.outside(origin)]
    state = {value.name: captured.tensor(value.name).detach().clone() for value in values}
    behind = graph_of_pass(plan, source)
    if behind is not None:
        check_names(plan, behind, "pass")
    return Prepared(plan, source, captured, batch, state, behind)


def run_options(plan: Plan, device: str) -> RunOptions:
    """What the plan's figures assume of the program."""
    from autopar.runtime.executor import RunOptions

    software = plan.software
    return RunOptions(
        device,
        SEED,
        overlap_gradients=software.overlap_gradients,
        prefetch_parameters=software.prefetch_parameters,
        master="float32" if software.master_bytes else "",
        compile=COMPILER if software.fusion == "compiled" else "",
    )


@dataclass(frozen=True)
class Reference:
    """The serial step of one model, batch and number of microbatches in one dtype: what plans are compared with.

    Attributes:
        graph: captured at the microbatch size.
        state, batch: as every executor takes them.
        serial: executor whose gradients are those of the step; `loss` is its loss.
        eager_error: see `VerifyReport`.
        behind: see `Prepared`.
    """

    dtype: str
    graph: OpGraph
    state: Mapping[str, torch.Tensor]
    batch: tuple[torch.Tensor, ...]
    serial: Executor
    loss: float
    eager_error: float | None
    behind: OpGraph | None = None


def make_reference(plan: Plan, dtype: str, device: str) -> Reference:
    """Build the plan's model and run its serial step; raises what `prepare` raises."""
    from autopar.capture.promote import promote
    from autopar.torch_adapter import dtype_of

    ready = prepare(plan, device)
    graph, wanted = promote(ready.captured.graph, dtype), dtype_of(dtype)
    state = {name: t.to(wanted) if t.is_floating_point() else t for name, t in ready.state.items()}
    batch = tuple(t.to(wanted) if t.is_floating_point() else t for t in ready.batch)
    serial = make_serial_executor(graph, state, run_options(plan, device), plan.decisions.num_microbatches)
    loss = serial.compute_gradients(batch)
    behind = None if ready.behind is None else promote(ready.behind, dtype)
    return Reference(dtype, graph, state, batch, serial, loss, _eager_error(ready, device), behind)


def compare_with(reference: Reference, executor: Executor, tolerance: float = FLOAT64_TOLERANCE) -> dict[str, Any]:
    """Run one step of a plan's executor beside the reference's; the fields of the report. Every rank must call."""
    from autopar.runtime.compare import compare

    loss = executor.compute_gradients(reference.batch)
    if is_updated_in_passes(executor.decisions):
        assert reference.behind is not None
        serial = SerialStep(reference.graph, reference.behind, executor.decisions, reference.state, SEED)
        found = compare_updates(executor, serial.run(reference.batch), reference.state, loss)
    else:
        found = compare(executor, loss, reference.serial, reference.loss)
    name, error = found.worst
    return {
        "num_processes": executor.decisions.num_gpus,
        "dtype": reference.dtype,
        "tolerance": tolerance,
        "serial_loss": found.serial_loss,
        "distributed_loss": found.distributed_loss,
        "loss_error": found.loss_error,
        "worst_parameter": reference.graph.values[name].fqn if name else "",
        "worst_gradient_error": error,
        "num_parameters": len(found.gradient_errors),
        "eager_error": reference.eager_error,
        "updates": updates_words(executor.decisions),
    }


def verify_worker(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of `verify_plan`; the fields of the report."""
    from autopar.runtime.executor import OptimizerOptions, join_plan
    from autopar.runtime.processes import device_name, device_type

    plan = parse_plan(arguments["plan"])
    device = device_name()
    reference = make_reference(plan, arguments["dtype"], device)
    mesh = join_plan(reference.graph, plan.decisions, device_type())
    options = run_options(plan, device)
    if is_updated_in_passes(plan.decisions):
        options = replace(options, optimizer=OptimizerOptions("sgd", LEARNING_RATE, 0.0))
    executor = make_executor(reference.graph, plan.decisions, reference.state, mesh, options, behind=reference.behind)
    return compare_with(reference, executor, arguments["tolerance"])


def eager_arguments(ready: Prepared) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The captured inputs, one microbatch, as the user's module takes them."""
    import torch

    from autopar import torch_adapter
    from autopar.capture.model_source import as_arguments

    leaves = iter(ready.captured.inputs)
    return as_arguments(
        torch_adapter.tree_map(
            lambda leaf: next(leaves) if isinstance(leaf, torch.Tensor) else leaf, ready.source.raw_batch()
        )
    )


def _eager_error(ready: Prepared, device: str) -> float | None:
    """Largest relative error of loss and gradients of the captured graph against the eager module, one microbatch."""
    import torch

    from autopar.runtime.compare import relative_error, smallest_scale
    from autopar.runtime.executor import RunOptions

    graph, module = ready.captured.graph, ready.captured.module
    serial = make_serial_executor(graph, ready.state, RunOptions(device, SEED))
    if serial.draws_random:
        return None
    loss = serial.compute_gradients(ready.captured.inputs)
    args, kwargs = eager_arguments(ready)
    module.zero_grad()
    eager_loss = module(*args, **kwargs)
    eager_loss.backward()
    gradients = {name: ready.captured.tensor(name).grad for name in serial.store.items}
    floor = smallest_scale(gradients.values())
    errors = [relative_error(serial.store.whole_gradient(n), g, floor) for n, g in gradients.items()]
    return max([relative_error(torch.tensor(loss), eager_loss.detach().double().cpu()), *errors])


def run_worker(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of `run_plan`; the fields of the report."""
    from autopar.planner.data import open_feed
    from autopar.runtime.course import Course
    from autopar.runtime.executor import OptimizerOptions, join_plan
    from autopar.runtime.measure import measure_steps
    from autopar.runtime.processes import device_name, device_type

    plan, settings = parse_plan(arguments["plan"]), RunSettings(**arguments["settings"])
    replanned: list[str] = []
    if settings.checkpoints:  # what a launcher restarts after a failure may have fewer processes
        plan = plan_for_world(plan, replanned.append)
    device = device_name()
    ready = prepare(plan, "cpu")
    graph, batch, source, aliases = ready.captured.graph, ready.batch, ready.source, ready.captured.aliases
    mesh = join_plan(graph, plan.decisions, device_type())
    options = replace(run_options(plan, device), optimizer=OptimizerOptions(max_norm=settings.clip_norm))
    options = replace(options, compile=settings.compile or options.compile, offload_directory=settings.offload_dir)
    executor = make_executor(graph, plan.decisions, ready.state, mesh, options, behind=ready.behind)
    del ready  # the whole model; the executor has its own parts
    start = start_of(plan, settings, options.optimizer.kind)
    course = Course(executor, settings, start, aliases=aliases, work=work_of_ranks(plan))
    first_step, num_steps = course.position.step, course.num_left
    form = input_form(graph, plan.decisions, mesh, batch)
    feed, notes = open_feed(source, form, batch, settings, first_step)
    switch_notes: list[str] = []
    if num_steps:
        with switched_clocks(executor, arguments.get("switching"), switch_notes):
            measured = measure_steps(executor, feed, num_steps, first_step=first_step, after_step=course.after_step)
    else:
        measured = course.past()
    feed.close()
    course.finish()
    return {
        "num_processes": plan.decisions.num_gpus,
        "first_step": first_step,
        "losses": list(measured.losses),
        "step_time": _fields(measured.step_time),
        "window": measured.window_fields(device),
        "notes": [*replanned, *course.remarks, *notes, *switch_notes, *feed.remarks(measured.total_s)],
        "straggler": None if course.straggler is None else asdict(course.straggler),
    }


def work_of_ranks(plan: Plan) -> list[float]:
    """Predicted seconds of forward and backward of a microbatch on each rank, of all chunks that it holds."""
    decisions, count = plan.decisions, plan.decisions.num_ranks
    seconds = [stage.forward_s.value + stage.backward_s.value for stage in plan.predicted.stages]
    by_rank = [sum(seconds[rank::count]) for rank in range(count)]
    return [work for work, mesh in zip(by_rank, decisions.meshes, strict=True) for _ in range(mesh.num_devices)]


def start_of(plan: Plan, settings: RunSettings, optimizer: str) -> Position:
    """Step 0 of a run."""
    from autopar.runtime.checkpoint_store import Position

    return Position(
        step=0,
        seed=SEED,
        data_seed=settings.data_seed,
        batch_size=plan.model.batch_size,
        optimizer=optimizer,
        num_gpus=plan.decisions.num_gpus,
        source=plan.model.source,
        graph_hash=plan.model.graph_hash,
    )


def _fields(quantity: Quantity) -> dict[str, Any]:
    return {name: getattr(quantity, name) for name in ("value", "unit", "label", "low", "high")}
