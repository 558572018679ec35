"""Measuring ops of a captured model at the local shapes that strategies leave, on random data, one op at a time.

What is not measured: views (they do nothing), regions and split-aware calls (they are no single torch op), and ops
that refuse random operands; the last are listed with their reason.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar import torch_adapter
from autopar.errors import InputError, ProfileError
from autopar.ir.graph import Arg, Op, OpGraph, Ref, Value
from autopar.ir.profile import OpProfile, ProfileKey
from autopar.ir.tensor import TensorMeta
from autopar.meters import EnergyMeter, WindowRules, measure_repeated
from autopar.rules.local_call import local_call
from autopar.rules.strategies import axis_strategies, local_metas

WARM_UPS = 2
LEAST_REPEATS = 3
UNWATCHED_S, MOST_UNWATCHED = 0.02, 1000
"""While energy is measured, ops run back to back for so long, and at most so often, before the device is waited for:
gaps between kernels would lower the power."""
COLD_BYTES, MOST_COPIES = 64 * 2**20, 8
"""In training an operand was written long before it is read: on a processor, calls take turns on operands of so many
bytes together, in at most so many copies."""


@dataclass(frozen=True, slots=True)
class EnergyProbe:
    """Energy is measured by repeating an op for whole windows of the meter; blocked power is taken off."""

    meter: EnergyMeter
    blocked_w: float
    rules: WindowRules


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        device: torch device, `cpu` or `cuda:N`.
        device_name: kebab-case name under which rows are stored.
        axis_sizes: sizes of one mesh axis over which each op is split; 1 is the whole op.
        repeats: timed runs, of which the median counts, >= 1.
        energy: how to measure energy, or None.
        budget_s: after so long an op is repeated no more.
    """

    device: str = "cpu"
    device_name: str = "cpu"
    axis_sizes: tuple[int, ...] = (1, 2)
    repeats: int = 7
    energy: EnergyProbe | None = None
    budget_s: float = 0.3


@dataclass(frozen=True)
class ProfileRun:
    """Rows measured, and the ops that could not be, with the reason."""

    rows: tuple[OpProfile, ...]
    skipped: Mapping[str, str]


def profile_ops(
    graph: OpGraph,
    settings: Settings | None = None,
    progress: Callable[[str], None] | None = None,
    known: Collection[ProfileKey] = (),
) -> ProfileRun:
    """Measures each distinct local op of a graph (captured at the microbatch size) once, but not those of `known`.

    Processes that have joined a group begin every op together, and must all call.

    Raises:
        InputError: for a device that is not there.
    """
    settings = Settings() if settings is None else settings
    _check_device(settings.device)
    rows: dict[ProfileKey, OpProfile] = {}
    skipped: dict[str, str] = {}
    work = {key: wants for key, wants in local_ops(graph, settings) if key not in known}
    provenance = provenance_of(settings)
    for count, (key, wants_grad) in enumerate(work.items(), start=1):
        if progress is not None:
            progress(f"{count}/{len(work)} {key.target}")
        if dist.is_initialized():
            dist.barrier()
        try:
            rows[key] = _measure(key, wants_grad, settings, provenance)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            skipped[key.target] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return ProfileRun(tuple(rows.values()), skipped)


def local_ops(graph: OpGraph, settings: Settings) -> Iterator[tuple[ProfileKey, tuple[bool, ...]]]:
    """Keys to measure, and which operands get a gradient."""
    for op in graph.ops:
        if op.members or not op.target.startswith("aten.") or _is_view(op, graph.values):
            continue
        wants_grad = tuple(graph.values[name].requires_grad for name in op.inputs)
        for size in settings.axis_sizes:
            for strategy in (
                axis_strategies(op, graph.values, size) if size > 1 else axis_strategies(op, graph.values)[:1]
            ):
                call = local_call(op, (strategy,), (size,), graph.values)
                metas = local_metas(op, (strategy,), (size,), graph.values)
                if call.target == op.target and metas is not None:
                    kwargs = tuple(sorted(call.kwargs.items()))
                    yield ProfileKey(op.target, metas[0], call.args, kwargs, settings.device_name), wants_grad


def _is_view(op: Op, values: Mapping[str, Value]) -> bool:
    is_in_place = op.target.split(".")[1].endswith("_") or bool(op.mutates)
    return not is_in_place and all(values[name].root != name for name in op.outputs)


def _check_device(device: str) -> None:
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"device {device!r} is not there: this machine has cpu" + _cuda_names())


def _cuda_names() -> str:
    return "".join(f", cuda:{i}" for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else " alone"


def _measure(
    key: ProfileKey, wants_grad: tuple[bool, ...], settings: Settings, provenance: Mapping[str, str]
) -> OpProfile:
    turns = cycle(_operands(key, wants_grad, settings.device))

    def forward(inputs: Sequence[Tensor] | None = None) -> Any:
        inputs = next(turns) if inputs is None else inputs
        kwargs = {name: _fill(value, inputs, settings.device) for name, value in key.kwargs}
        return torch_adapter.call(key.target, [_fill(arg, inputs, settings.device) for arg in key.args], kwargs)

    backward = _backward(forward, turns)
    peak = _peak_bytes(backward or forward, settings.device)
    forwards = timed_runs(forward, settings)
    both = timed_runs(backward, settings) if backward is not None else None
    middle = statistics.median(forwards)
    tenth, ninetieth = sorted(forwards)[len(forwards) // 10], sorted(forwards)[(9 * len(forwards)) // 10]
    return OpProfile(
        key,
        middle,
        0.0 if both is None else max(0.0, statistics.median(both) - middle),
        (ninetieth - tenth) / middle if middle > 0 else 0.0,
        peak,
        _energy_j(backward or forward, middle, settings),
        len(forwards),
        provenance,
    )


def _operands(key: ProfileKey, wants_grad: tuple[bool, ...], device: str) -> list[list[Tensor]]:
    """Operands of a few calls, so many that the first have left the cache when their turn comes again."""
    generator = torch.Generator(device=device).manual_seed(0)
    num_bytes = sum(meta.num_bytes for meta in key.inputs)
    count = 1 if device != "cpu" else max(1, min(MOST_COPIES, COLD_BYTES // max(num_bytes, 1)))
    return [
        [
            _random(meta, key, index, generator, device).requires_grad_(grad and meta.is_floating)
            for index, (meta, grad) in enumerate(zip(key.inputs, wants_grad, strict=True))
        ]
        for _ in range(count)
    ]


def _backward(forward: Callable[..., Any], turns: Iterator[Sequence[Tensor]]) -> Callable[[], Any] | None:
    """Forward and backward as one function, or None where there is no gradient."""
    inputs = next(turns)
    results = [r for r in _tensors(forward(inputs)) if r.requires_grad]
    if not any(tensor.requires_grad for tensor in inputs) or not results:
        return None
    gradients = [torch.rand_like(result) for result in results]

    def run() -> Any:
        inputs = next(turns)
        found = [r for r in _tensors(forward(inputs)) if r.requires_grad]
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        return torch.autograd.grad(found, leaves, gradients, allow_unused=True)

    return run


def _tensors(result: Any) -> list[Tensor]:
    items = result if isinstance(result, tuple | list) else (result,)
    return [item for item in items if isinstance(item, Tensor)]


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def clock_of(device: str) -> Callable[[], float]:
    """The clock to time ops with: of this thread alone where it does all the work, so that programs that share the
    processor do not count; else that on the wall.
    """
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed_runs(run: Callable[[], Any], settings: Settings) -> list[float]:
    """Seconds of each timed run, the device idle at both ends; fewer than asked for once `budget_s` is spent."""
    clock = clock_of(settings.device)
    for _ in range(WARM_UPS):
        run()
    found: list[float] = []
    while len(found) < settings.repeats and not (len(found) >= LEAST_REPEATS and sum(found) > settings.budget_s):
        _synchronise(settings.device)
        began = clock()
        run()
        _synchronise(settings.device)
        found.append(clock() - began)
    return found


def _peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Memory above what was allocated before; None on a device that does not count."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    _synchronise(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _energy_j(run: Callable[[], Any], time_s: float, settings: Settings) -> float | None:
    """Joules of one run above blocked power, or None if the meter does not know."""
    probe = settings.energy
    if probe is None:
        return None
    count = max(1, min(MOST_UNWATCHED, int(UNWATCHED_S / time_s))) if time_s > 0 else 1

    def batch() -> None:
        for _ in range(count):
            run()

    found = measure_repeated(batch, probe.meter, probe.rules, synchronise=lambda: _synchronise(settings.device))
    if found.reading.value_j is None:
        return None
    return max(0.0, found.reading.value_j - probe.blocked_w * found.time_s) / count


def _random(meta: TensorMeta, key: ProfileKey, index: int, generator: torch.Generator, device: str) -> Tensor:
    """Realistic operands: normal floats, valid indices."""
    dtype = torch_adapter.dtype_of(meta.dtype)
    if meta.is_floating:
        return torch.randn(meta.shape, generator=generator, device=device).to(dtype)
    return torch.randint(0, _index_limit(key, index), meta.shape, generator=generator, device=device).to(dtype)


def _index_limit(key: ProfileKey, index: int) -> int:
    """Integers below this are valid in operand `index`: rows of an embedding, classes of a loss, else 2."""
    name, first = key.target.split(".")[1], key.inputs[0].shape
    if index > 0 and name == "embedding":
        return first[0]
    if index > 0 and name == "cross_entropy_loss":
        return first[1] if len(first) > 1 else first[0]
    return 2


def _fill(arg: Arg, inputs: Sequence[Tensor], device: str) -> Any:
    if isinstance(arg, Ref):
        return inputs[arg.index]
    if isinstance(arg, tuple):
        return [_fill(item, inputs, device) for item in arg]
    return torch_adapter.decode_constant(arg, device)


def provenance_of(settings: Settings) -> dict[str, str]:
    """Machine, device, date, torch version and threads. Raises ProfileError for settings that measure nothing."""
    name = platform.processor() or platform.machine()
    if settings.device != "cpu":
        name = torch.cuda.get_device_name(settings.device)
    if settings.repeats < 1:
        raise ProfileError(f"repeats must be at least 1, found {settings.repeats}")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
