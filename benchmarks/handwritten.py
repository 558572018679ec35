"""The counterparts of `execution.py`: the same training steps, written by hand in plain torch.

Each has `step`, which returns the loss that this rank knows (its own part's in data parallelism, the whole one in
tensor parallelism, nothing but on the last stage of a pipeline), and takes the whole batch. Nothing is gathered for
the sake of reporting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

Batch = Mapping[str, Tensor]
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01


def optimizer_of(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in one kernel; DTensors and plain tensors apart, since no kernel takes both."""
    plain = [p for p in parameters if type(p.data) is Tensor]
    split = [p for p in parameters if type(p.data) is not Tensor]
    groups = [{"params": found} for found in (plain, split) if found]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


class Plain:
    """The eager module on one device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = optimizer_of(list(model.parameters()))

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        loss = self.model(*batch.values())
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class Data(Plain):
    """DistributedDataParallel, with gradients that are views of its buckets; this rank's part of the batch."""

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
            synchronise_norms(model)
        super().__init__(DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True))

    def step(self, batch: Batch) -> float:
        return super().step(own_part(batch))


class Sharded(Plain):
    """fully_shard by block and around the whole, as its documentation advises; this rank's part of the batch."""

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
            synchronise_norms(model)
        mesh = _mesh("data")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        super().__init__(model)

    def step(self, batch: Batch) -> float:
        return super().step(own_part(batch))


class Tensors(Plain):
    """parallelize_module as in Megatron: columns, then rows; the table of tokens by rows, the loss by classes."""

    def __init__(self, model: nn.Module) -> None:
        column, row = ColwiseParallel, RowwiseParallel
        by_block = {
            **{f"attention.{name}": column() for name in ("query", "key", "value")},
            "attention.out": row(),
            "wide": column(),
            "narrow": row(),
        }
        styles = {f"blocks.{i}.{name}": style for i in range(len(model.blocks)) for name, style in by_block.items()}
        styles["embedding.tokens"] = row(input_layouts=Replicate())
        styles["head"] = column(output_layouts=Shard(-1), use_local_output=False)
        super().__init__(parallelize_module(model, _mesh("tensor"), styles))

    def step(self, batch: Batch) -> float:
        with loss_parallel():
            return super().step(batch)


class _First(nn.Module):
    """What comes before a cut behind `count` blocks."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.start = model.embedding if hasattr(model, "embedding") else model.stem
        self.blocks = nn.Sequential(*list(model.blocks)[:count])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.start(x))


class _Last(nn.Module):
    """What comes after."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*list(model.blocks)[count:])
        self.norm, self.head = getattr(model, "norm", None), model.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.mean((2, 3)) if self.norm is None else self.norm(x))


class Pipeline:
    """PipelineStage and Schedule1F1B, two stages cut behind `count` blocks."""

    def __init__(self, model: nn.Module, count: int, num_microbatches: int) -> None:
        self.is_last = dist.get_rank() == dist.get_world_size() - 1
        part = _Last(model, count) if self.is_last else _First(model, count)
        self.optimizer = optimizer_of(list(part.parameters()))
        stage = PipelineStage(part, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        self.schedule = Schedule1F1B(stage, num_microbatches, loss_fn=_mean_loss)

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        read, targets = batch.values()
        losses: list[Tensor] = []
        if self.is_last:
            self.schedule.step(target=targets, losses=losses, return_outputs=False)
        else:
            self.schedule.step(read)
        self.optimizer.step()
        return float(torch.stack(losses).mean()) if losses else math.nan


def _mean_loss(output: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), targets.flatten())


def _mesh(name: str) -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))


def own_part(batch: Batch) -> dict[str, Tensor]:
    """This rank's samples."""
    return {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in batch.items()}


def synchronise_norms(model: nn.Module) -> None:
    """Every BatchNorm2d over the samples of all ranks: torch's SyncBatchNorm has no CPU kernels."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, SynchronisedNorm(child))


class SynchronisedNorm(nn.Module):
    """Statistics of the whole batch, one sum over ranks forward and one backward."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.momentum = norm.eps, norm.momentum
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        normed, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return normed


class _Normalise(torch.autograd.Function):
    """(x[N C H W] - mean[C]) / sqrt(var[C] + eps) * weight[C] + bias[C] over all ranks, by kernels of one rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
        count = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / count  # var_mean takes ten times as long on the CPU
        var = (x - mean.view(1, -1, 1, 1)).square_().sum((0, 2, 3)) / count
        sums = torch.stack([mean, var + mean.square()])
        dist.all_reduce(sums)
        mean, square = sums / dist.get_world_size()
        var = square - mean.square()
        ctx.save_for_backward(x, weight, mean, var)
        count *= dist.get_world_size()
        ctx.eps, ctx.count = eps, count
        ctx.mark_non_differentiable(mean, var)
        return functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scaled, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([by_weight, by_bias])
        dist.all_reduce(sums)
        inverse = (var + ctx.eps).rsqrt()
        slope = -weight * inverse.square() * sums[0] / ctx.count
        offset = -weight * inverse * sums[1] / ctx.count - slope * mean
        shape = (1, -1, 1, 1)
        scaled.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
        return scaled, by_weight, by_bias, None


PROGRAMS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"single": Plain, "data": Data, "zero3": Sharded, "tensor": Tensors, "pipeline": Pipeline}
)
