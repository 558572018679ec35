"""Fully connected layers of one width, for `cpu_truth.py`."""

import torch
from torch import nn
from torch.nn import functional


def build_model(*, width: int = 1024, layers: int = 6) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def example_batch(*, batch: int = 256, width: int = 1024) -> tuple[torch.Tensor]:
    return (torch.rand(batch, width, generator=torch.Generator().manual_seed(0)),)


def loss(output: torch.Tensor, batch: tuple[torch.Tensor]) -> torch.Tensor:
    return functional.mse_loss(output, batch[0])
