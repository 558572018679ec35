"""Comparing a distributed run with the serial one: loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.executor import Executor

SMALLEST_SHARE = 1e-4
"""A gradient's error is measured against its own largest entry, but at least this share of the largest of the model.

Some gradients are zero in exact arithmetic (a bias before a batch norm, the bias of attention keys), and what is
computed is rounding noise, which differs between any two orders of summation.
"""


@dataclass(frozen=True)
class Agreement:
    """How far a distributed step is from the serial one.

    Attributes:
        serial_loss, distributed_loss: means over the microbatches.
        loss_error: relative.
        gradient_errors: by value name, the largest deviation over the largest entry of the serial gradient.
    """

    serial_loss: float
    distributed_loss: float
    loss_error: float
    gradient_errors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """Parameter with the largest error; ("", 0) without parameters."""
        return max(self.gradient_errors.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def largest_error(self) -> float:
        return max(self.loss_error, self.worst[1])


def relative_error(found: Tensor | None, expected: Tensor | None, smallest_scale: float = 0.0) -> float:
    """Largest deviation over the largest expected entry; NaN is infinite.

    Args:
        found, expected: of one shape; None counts as zeros.
        smallest_scale: what to divide by at least; where both are 0 the error is absolute.
    """
    if found is None or expected is None:
        present = found if found is not None else expected
        return 0.0 if present is None or not bool(present.any()) else float("inf")
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), smallest_scale)
    error = float((found - expected).abs().max()) / (scale or 1.0)
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN is not itself


def smallest_scale(gradients: Iterable[Tensor | None]) -> float:
    """What to divide the error of any gradient by at least; see `SMALLEST_SHARE`."""
    return SMALLEST_SHARE * max((float(g.abs().max()) for g in gradients if g is not None and g.numel()), default=0.0)


def compare(distributed: Executor, loss: float, serial: Executor, serial_loss: float) -> Agreement:
    """Compare after `compute_gradients` of both; every rank must call and gets the same answer.

    Args:
        distributed: this rank's executor.
        loss: what its `compute_gradients` returned.
        serial: executor of the serial program on the same batch and state.
        serial_loss: likewise.
    """
    expected = {name: serial.store.whole_gradient(name) for name in serial.store.items}
    return agreement(distributed, distributed.store.whole_gradient, expected, loss, serial_loss)


def agreement(
    distributed: Executor,
    found: Callable[[str], Tensor | None],
    expected: Mapping[str, Tensor | None],
    loss: float,
    serial_loss: float,
) -> Agreement:
    """Compare what this rank finds of each of its parameters; every rank must call and gets the same answer."""
    floor = smallest_scale(expected.values())
    errors = {name: relative_error(found(name), expected[name], floor) for name in distributed.store.items}
    if dist.is_initialized():
        gathered: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, errors)
        errors = {name: max(part.get(name, 0.0) for part in gathered) for name in expected}
    loss_error = relative_error(torch.tensor(loss), torch.tensor(serial_loss))
    return Agreement(serial_loss, loss, loss_error, errors)
