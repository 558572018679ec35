"""Replica: the parameters of one worker as one vector, and the task that gives their gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.runtime.sync.hooks import FlatBucket


class Task(Protocol):
    """What one worker computes."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What is trained, of one dtype; equal on all workers at the start."""

    def gradient(self, step: int) -> float:
        """Add the gradient of this worker's samples of a step to `.grad` of every parameter; returns the loss."""


class ModuleTask:
    """A module whose result is the loss, and the samples of every step."""

    def __init__(self, module: torch.nn.Module, batch: Callable[[int], tuple[Sequence[Any], dict[str, Any]]]) -> None:
        """`batch(step)` gives positional and keyword arguments."""
        self.module = module
        self._batch = batch
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def gradient(self, step: int) -> float:
        args, kwargs = self._batch(step)
        loss = self.module(*args, **kwargs)
        loss.backward()
        return float(loss.detach())


class Replica:
    """Parameters and gradients of a task, laid out as one vector each; buffers of a module stay the worker's own."""

    def __init__(self, task: Task) -> None:
        """Move the task's parameters into the vectors. Raises InputError where they are of several dtypes."""
        parameters = list(task.parameters)
        kinds = {parameter.dtype for parameter in parameters}
        if len(kinds) != 1:
            names = ", ".join(sorted(map(str, kinds))) or "no parameters"
            raise InputError(f"parameters must be of one dtype to be exchanged as one vector, found {names}")
        self.task = task
        self.values = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self.gradient = torch.zeros_like(self.values)
        views, start = [], 0
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.data = self.values[start:stop].view(parameter.shape)
            parameter.grad = self.gradient[start:stop].view(parameter.shape)
            views.append(parameter.grad)
            start = stop
        self.views = views

    def compute(self, step: int) -> float:
        """Fill `gradient`; the loss."""
        self.gradient.zero_()
        return self.task.gradient(step)

    @property
    def bucket(self) -> FlatBucket:
        return FlatBucket(self.gradient, self.views)


class Descent:
    """SGD with momentum on one vector: v = momentum v + g; w -= rate v."""

    def __init__(self, rate: float, momentum: float) -> None:
        self.rate, self.momentum = rate, momentum
        self._velocity: Tensor | None = None

    def apply(self, values: Tensor, gradient: Tensor, scale: float = 1.0) -> None:
        """One update, of `scale` times the rate."""
        if self.momentum:
            old = torch.zeros_like(gradient) if self._velocity is None else self._velocity
            self._velocity = gradient = old.mul_(self.momentum).add_(gradient)
        values.sub_(gradient, alpha=self.rate * scale)
