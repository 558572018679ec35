"""BatchNorm whose statistics are those of the samples of several ranks.

The kernels of one rank do the work: they normalise by given statistics, and the sums that their backward finds are
what has to be added up over ranks. Nothing but the input is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.program.collectives import AxisGroup, all_gather_flat, all_reduce_sum


def batch_norm(  # noqa: PLR0917 - the order of ATen
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
    *,
    batch_axes: tuple[AxisGroup, ...],
) -> Tensor:
    """Normalise x[N C ..] by the mean and variance over all samples of all ranks of `batch_axes`.

    The running statistics are updated as in the serial op: momentum, and the unbiased variance. As there, 16 bits are
    widened for all of it.
    """
    assert training, "in evaluation batch_norm needs no synchronisation"
    dtype = x.dtype
    wide = torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype
    scale, offset = (None if t is None else t.to(wide) for t in (weight, bias))
    normed: tuple[Tensor, Tensor, Tensor, int] = _Normalise.apply(  # type: ignore[no-untyped-call]
        x.to(wide), scale, offset, eps, batch_axes
    )
    y, mean, var, count = normed
    if running_mean is not None and running_var is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
    return y.to(dtype)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias; with it mean[C], var[C] and the number of samples."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: tuple[AxisGroup, ...]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        mean, var, count = _statistics(x, axes)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.axes, ctx.count, ctx.has_bias = eps, axes, count, bias is not None
        ctx.mark_non_differentiable(mean, var)
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With z = (x - mean) / sqrt(var + eps), g = weight / sqrt(var + eps): g (dy - mean(dy) - z mean(dy z))."""
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        scaled, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward.default(
            gradients[0], x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([by_weight, by_bias])
        for axis in ctx.axes:
            sums = all_reduce_sum(sums, axis)
        inverse = (var + ctx.eps).rsqrt()
        slope = -scale * inverse.square() * sums[0] / ctx.count
        offset = -scale * inverse * sums[1] / ctx.count - slope * mean
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        scaled.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
        return scaled, None if weight is None else by_weight, by_bias if ctx.has_bias else None, None, None


def _statistics(x: Tensor, axes: tuple[AxisGroup, ...]) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of each channel, and the number of samples of a channel, over all ranks."""
    dims = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // x.shape[1]
    mean = x.sum(dims) / count
    # Not `var_mean`, which takes ten times as long on the CPU.
    var = (x - mean.view([-1 if d == 1 else 1 for d in range(x.dim())])).square_().sum(dims) / count
    for axis in axes:
        if axis.size > 1:
            own = torch.stack([mean, var])
            found = own.new_empty((axis.size, *own.shape))
            all_gather_flat(found.view(-1), own.view(-1), axis).wait()
            means, variances = found.unbind(1)
            mean = means.mean(0)
            var = (variances + (means - mean).square()).mean(0)
            count *= axis.size
    return mean, var, count
