"""Jobs of `test_sync.py`, run by every process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from autopar.ir.sync import parse_policy
from autopar.runtime.sync.replica import ModuleTask
from autopar.runtime.sync.train import TrainOptions, train

SAMPLES = 24
INPUTS, HIDDEN = 12, 16


def make_task(worker: int, num_workers: int) -> ModuleTask:
    """A small network in float64; worker k of W has every W-th sample, from its own on; two batches take turns."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1)).double()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    y = x.sum(dim=-1, keepdim=True).sin()

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.model(x), y)

    return ModuleTask(Loss(), lambda step: ([x[step % 2, worker::num_workers], y[step % 2, worker::num_workers]], {}))


def make_convex_task(worker: int, num_workers: int) -> ModuleTask:
    """Least squares with a known solution, float64."""

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(INPUTS, dtype=torch.float64))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.mse_loss(x @ self.w, y)

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES * 2, INPUTS, generator=generator, dtype=torch.float64)
    y = x @ torch.arange(1.0, INPUTS + 1, dtype=torch.float64)
    return ModuleTask(Loss(), lambda step: ([x[worker::num_workers], y[worker::num_workers]], {}))


TASKS = {"network": make_task, "convex": make_convex_task}


def train_all(arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Trainings one after another: each is (name, task, policy, fields of TrainOptions)."""
    found = {}
    for name, task, text, fields in arguments["trainings"]:
        with counted_bytes() as sent:
            trained = train(TASKS[task], parse_policy(text), TrainOptions(**fields))
        run = trained.run
        found[name] = {
            "values": trained.values.tolist(),
            "losses": list(run.losses),
            "staleness": [[late, count] for late, count in run.staleness.items()],
            "num_workers": run.num_workers,
            "step_s": run.step_time.value,
            "energy": None if run.energy is None else run.energy.label,
            "notes": list(run.notes),
            "sent": [[kind, size, count] for (kind, size), count in sorted(sent.items())],
        }
    return found


@contextmanager
def counted_bytes() -> Iterator[Counter[tuple[str, int]]]:
    """Counts this process's transfers by kind and bytes (as `cost.collective` counts them) while it is open."""
    sent: Counter[tuple[str, int]] = Counter()
    names = ("all_reduce", "all_gather_into_tensor", "all_to_all_single", "send")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
            kind = {"all_gather_into_tensor": "all_gather", "all_to_all_single": "all_to_all"}.get(name, name)
            sent[kind, tensor.numel() * tensor.element_size()] += 1
            return originals[name](tensor, *rest, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def shapes_of(task: str) -> Sequence[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in TASKS[task](0, 1).parameters]
