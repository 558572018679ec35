"""Executing plans for inference: `run_inference` runs forward passes, `verify_inference` compares one with the serial
model: every output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from autopar.clocks.hold import Held
from autopar.errors import InputError, VerifyError
from autopar.ir.hosts import Hosts
from autopar.ir.inference import per_second
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.ir.run import RunSettings
from autopar.ir.serialize import dump_plan, parse_plan
from autopar.meters import node_reading
from autopar.planner.assemble import make_inference_executor, make_serial_inference
from autopar.planner.execute import (
    EAGER_TOLERANCE,
    FLOAT64_TOLERANCE,
    SEED,
    Prepared,
    eager_arguments,
    on_all_ranks,
    prepare,
    run_options,
)
from autopar.planner.run_energy import RunEnergy, Window, run_energy
from autopar.planner.settings import BoardSettings, held_boards, node_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from autopar.runtime.inference import InferenceExecutor


@dataclass(frozen=True)
class InferenceReport:
    """How far the outputs of the distributed program are from those of the serial one.

    Attributes:
        dtype, tolerance: of the comparison; errors are relative to the largest entry of an output.
        worst_output: key of the output with the largest error.
        eager_error: the captured graph against the user's eager model in its own dtype; None where that cannot be
            compared because the model draws random numbers.
    """

    num_processes: int
    dtype: str
    tolerance: float
    num_outputs: int
    worst_output: str
    output_error: float
    eager_error: float | None

    def __str__(self) -> str:
        eager = "not compared (random numbers)" if self.eager_error is None else f"differs by {self.eager_error:.1e}"
        worst = f" in {self.worst_output}" if self.worst_output else ""
        return "\n".join(
            [
                f"verified on {self.num_processes} processes in {self.dtype}, tolerance {self.tolerance:.0e}",
                f"  outputs    {self.num_outputs} tensors, largest error {self.output_error:.1e}{worst}",
                f"  capture    against the eager model: {eager}",
            ]
        )


@dataclass(frozen=True)
class InferenceRun:
    """What forward passes measured.

    Attributes:
        latency: median over the passes after the first, with the range seen.
        samples_per_s, tokens_per_s: where each batch starts when the one before is done; None: not sequences.
        energy: of the average pass over all devices.
        held: clocks and power limits that were set meanwhile, and what was not.
    """

    num_processes: int
    num_passes: int
    latency: Quantity
    samples_per_s: Quantity
    tokens_per_s: Quantity | None
    energy: RunEnergy
    held: Held

    def __str__(self) -> str:
        time, rates = self.latency, [self.samples_per_s, *([self.tokens_per_s] if self.tokens_per_s else [])]
        words = ", ".join(f"{rate.value:.4g} {rate.unit}" for rate in rates)
        lines = [
            f"{self.num_passes} forward passes on {self.num_processes} processes",
            f"  latency    {time.value:.4g} s per batch ({time.low:.4g} to {time.high:.4g}), {time.label}",
            f"  throughput {words}, one batch after another, {time.label}",
            f"  energy     {self.energy.total.value:.4g} J per batch, {self.energy.total.label}: {self.energy.text}",
        ]
        notes = (*self.energy.notes, *self.held.notes)
        return "\n".join([*lines, *(f"  note: {note}" for note in notes), *(f"    {c}" for c in self.held.commands)])


def verify_inference(
    plan: Plan,
    *,
    dtype: str = "float64",
    tolerance: float = FLOAT64_TOLERANCE,
    progress: Callable[[str], None] | None = None,
    hosts: Hosts | None = None,
) -> InferenceReport:
    """Run one pass of the plan and of the serial model on the same batch and compare every output.

    Raises:
        VerifyError: they disagree.
        PlanMismatchError: the plan was made for another model.
        WorkerError: a process died.
    """
    arguments = {"plan": dump_plan(plan), "dtype": dtype, "tolerance": tolerance}
    report = InferenceReport(**on_all_ranks(verify_worker, arguments, plan.decisions.num_gpus, progress, hosts))
    disagreements = [
        f"{what} differs by {error:.3e} (tolerance {limit:.0e})"
        for what, error, limit in (
            (f"the output {report.worst_output}", report.output_error, tolerance),
            ("the captured graph against the eager model", report.eager_error or 0.0, EAGER_TOLERANCE),
        )
        if not error <= limit
    ]
    if disagreements:
        raise VerifyError("the plan does not compute what the serial model computes: " + "; ".join(disagreements))
    return report


def check_run(settings: RunSettings) -> None:
    """Raises InputError for settings that are for training."""
    plain = RunSettings(steps=settings.steps, compile=settings.compile)
    given = [field.name for field in fields(RunSettings) if getattr(settings, field.name) != getattr(plain, field.name)]
    if given:
        names = ", ".join(name.removeprefix("is_") for name in given)
        raise InputError(f"a plan for inference runs forward passes: there is nothing to do with {names}")


def run_inference(
    plan: Plan,
    settings: RunSettings | None = None,
    *,
    boards: BoardSettings | None = None,
    hosts: Hosts | None = None,
    progress: Callable[[str], None] | None = None,
) -> InferenceRun:
    """Run `settings.steps` forward passes over the example batch, which lies on the devices before the first.

    Raises:
        InputError: settings of training.
        PlanMismatchError: the plan was made for another model.
        NetworkError: ranks did not meet, or lost each other.
        WorkerError: a process died.
    """
    settings = settings or RunSettings()
    check_run(settings)
    arguments = {"plan": dump_plan(plan), "settings": asdict(settings)}
    num_processes = plan.decisions.num_gpus
    boards, ranks = boards or BoardSettings(), node_ranks(num_processes, hosts or Hosts())
    if boards.schedule is not None:
        raise InputError("--clock-schedule is of steps that train: a plan for inference has none")
    with held_boards(plan, boards, ranks, progress) as held:
        found = on_all_ranks(run_worker, arguments, num_processes, progress, hosts)
    time, window = Quantity(**found["step_time"]), found["window"]
    reading = None if window["reading"] is None else node_reading(window["reading"])
    batch, tokens = plan.model.batch_size, plan.model.batch_size * plan.tokens_per_sample
    return InferenceRun(
        num_processes=num_processes,
        num_passes=settings.steps,
        latency=time,
        samples_per_s=per_second(batch, time, "samples/s"),
        tokens_per_s=per_second(tokens, time, "tokens/s") if tokens else None,
        energy=run_energy(plan, Window(**{**window, "reading": reading, "step_time": time})),
        held=held,
    )


def run_worker(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of `run_inference`."""
    from dataclasses import replace

    from autopar.runtime.executor import join_plan
    from autopar.runtime.inference import measure_passes
    from autopar.runtime.processes import device_name, device_type

    plan, settings = parse_plan(arguments["plan"]), RunSettings(**arguments["settings"])
    device = device_name()
    ready = prepare(plan, "cpu")
    graph, options = ready.captured.graph, run_options(plan, device)
    options = replace(options, compile=settings.compile or options.compile)
    mesh = join_plan(graph, plan.decisions, device_type())
    executor = make_inference_executor(graph, plan.decisions, ready.state, mesh, options)
    placed = executor.place(ready.batch)
    del ready  # the whole model; the executor has its own parts
    measured = measure_passes(executor, placed, settings.steps)
    return {"step_time": asdict(measured.step_time), "window": measured.window_fields(device)}


def verify_worker(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One rank of `verify_inference`; the fields of the report."""
    from autopar.capture.promote import promote
    from autopar.runtime.executor import join_plan
    from autopar.runtime.processes import device_name, device_type
    from autopar.torch_adapter import dtype_of

    plan, device = parse_plan(arguments["plan"]), device_name()
    ready, wanted = prepare(plan, device), dtype_of(arguments["dtype"])
    graph = promote(ready.captured.graph, arguments["dtype"])

    def raised(x: Tensor) -> Tensor:
        return x.to(wanted) if x.is_floating_point() else x

    state = {name: raised(x) for name, x in ready.state.items()}
    batch, options = tuple(raised(x) for x in ready.batch), run_options(plan, device)
    serial = make_serial_inference(graph, state, options, plan.decisions.num_microbatches)
    expected = serial.forward(serial.place(batch))
    mesh = join_plan(graph, plan.decisions, device_type())
    executor = make_inference_executor(graph, plan.decisions, state, mesh, options)
    errors = output_errors(executor, executor.forward(executor.place(batch)), expected)
    keys = {output.value: output.key for output in graph.outputs}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "num_processes": plan.decisions.num_gpus,
        "dtype": arguments["dtype"],
        "tolerance": arguments["tolerance"],
        "num_outputs": len(errors),
        "worst_output": keys[worst],
        "output_error": errors[worst],
        "eager_error": _eager_error(ready, device),
    }


def output_errors(
    executor: InferenceExecutor, found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Largest relative error of each output over microbatches and ranks, by value name; every rank must call.

    An output that no rank has is infinitely wrong.

    Args:
        executor: of this rank.
        found: what it computed, by microbatch.
        expected: the serial outputs, whole, by microbatch.
    """
    import torch.distributed as dist

    from autopar.runtime.compare import relative_error

    errors: dict[str, float] = {}
    for own, whole in zip(found, expected, strict=True):
        for name, part in own.items():
            scale = float(whole[name].abs().max()) if whole[name].numel() else 0.0
            reference = executor.part_of(whole[name], executor.program.leaving[name])
            same = part.shape == reference.shape
            error = relative_error(part, reference, scale) if same else float("inf")
            errors[name] = max(errors.get(name, 0.0), error)
    everyone: list[dict[str, float]] = [errors]
    if dist.is_initialized():
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, errors)
    return {name: max((part[name] for part in everyone if name in part), default=float("inf")) for name in expected[0]}


def _eager_error(ready: Prepared, device: str) -> float | None:
    """Largest relative error of any output of the captured graph against the eager module, one microbatch."""
    import torch

    from autopar.capture.inference import InferenceForward
    from autopar.runtime.compare import relative_error
    from autopar.runtime.executor import RunOptions

    serial = make_serial_inference(ready.captured.graph, ready.state, RunOptions(device, SEED))
    if serial.program.draws_random:
        return None
    (found,) = serial.forward(serial.place(ready.captured.inputs))
    args, kwargs = eager_arguments(ready)
    module = ready.captured.module
    assert isinstance(module, InferenceForward)
    with torch.no_grad():
        tensors = module(*args, **kwargs)
    eager = dict(zip(module.returned, tensors, strict=True))
    pairs = ((found[output.value], eager[output.key]) for output in ready.captured.graph.outputs)
    return max(relative_error(own.double(), other.double()) for own, other in pairs)
