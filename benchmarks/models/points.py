"""Points around ten centres, by index, and a small classifier, for `failures.py`."""

import torch
from torch import nn
from torch.nn import functional


def build_model(*, width: int = 512) -> nn.Module:
    return nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))


def example_batch(*, batch: int = 480) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(batch, 32), torch.zeros(batch, dtype=torch.long)


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1])


class Points(torch.utils.data.Dataset):
    """Sample `index` is the same wherever and whenever it is read."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._centres = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        label = index % 10
        noise = torch.randn(32, generator=torch.Generator().manual_seed(1000 + index))
        return self._centres[label] + 2.0 * noise, label


def dataset(*, samples: int = 20000) -> Points:
    return Points(samples)
