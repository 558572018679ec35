"""Products whose weight gradients wait: the second half of a zero-bubble schedule's backward.

`delayed_*` compute what the ATen op of that name does. Backward of such a product returns the gradients of its other
operands; for that of the weight it leaves x and the gradient of the result in `DelayedWeights`. `take` hands out what
one backward has left, as one call, which computes the weights' gradients and lets them flow on to the parameters:
through what lies between (casts, redistributions with their collectives), and into the hooks of parameters.

Nothing of the product's autograd graph is kept meanwhile, and a piece that backward runs again does so once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class _Left(NamedTuple):
    """What one product leaves: the weight of y = x W (or x W^T where `is_transposed`) wants its gradient."""

    weight: GradientEdge
    x: Tensor
    gradient: Tensor
    is_transposed: bool

    def finish(self) -> None:
        x, gradient = self.x.reshape(-1, self.x.shape[-1]), self.gradient.reshape(-1, self.gradient.shape[-1])
        found = gradient.t() @ x if self.is_transposed else x.t() @ gradient
        torch.autograd.backward((self.weight,), (found,))


@dataclass
class DelayedWeights:
    """What the backward that runs now has left, in its order."""

    left: list[_Left] = field(default_factory=list)

    def take(self) -> Callable[[], None]:
        """The second half of the backward that has just ended."""
        left, self.left = self.left, []
        left.reverse()

        def finish() -> None:
            while left:
                left.pop().finish()

        return finish


class _Later(NamedTuple):
    """How a product is computed, and where its weight's gradient goes."""

    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weight: GradientEdge
    delayed: DelayedWeights


class _Product(torch.autograd.Function):
    """A product whose weight gets its gradient from `DelayedWeights`."""

    @staticmethod
    def forward(ctx: Any, later: _Later, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.later, ctx.bias_shape = later, None if bias is None else bias.shape
        ctx.save_for_backward(x, weight)
        return later.call(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        later, is_transposed = ctx.later, ctx.later.call is _linear
        later.delayed.left.append(_Left(later.weight, x.detach(), gradient.detach(), is_transposed))
        by_x = gradient @ (weight if is_transposed else weight.t())
        by_bias = gradient.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        return None, by_x, None, by_bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _product(
    delayed: DelayedWeights,
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):
        return call(x, weight, bias)
    later = _Later(call, get_gradient_edge(weight), delayed)
    made: Tensor = _Product.apply(later, x, weight.detach(), bias)  # type: ignore[no-untyped-call]
    return made


def delayed_linear(delayed: DelayedWeights, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[.. K] weight[N K]^T + bias[N]."""
    return _product(delayed, _linear, x, weight, bias)


def delayed_matmul(delayed: DelayedWeights, x: Tensor, weight: Tensor) -> Tensor:
    """x[.. K] weight[K N]."""
    return _product(delayed, _matmul, x, weight, None)


def delayed_addmm(delayed: DelayedWeights, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The bias + x[M K] weight[K N]."""
    return _product(delayed, _matmul, x, weight, bias)


DELAYED: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "aten.linear.default": delayed_linear,
        "aten.mm.default": delayed_matmul,
        "aten.matmul.default": delayed_matmul,
        "aten.addmm.default": delayed_addmm,
    }
)
"""By the ATen op that each stands for."""
