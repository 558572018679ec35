"""A model built from a list of layer names: what hypothesis draws when it makes up a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("linear", "mlp", "norm", "attention", "tied", "activation", "scale")
WIDTH, LENGTH, CLASSES = 8, 4, 16


class Attention(nn.Module):
    """Two heads over [batch, length, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            f(x).view(x.shape[0], LENGTH, 2, WIDTH // 2).transpose(1, 2) for f in (self.queries, self.keys, self.values)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return mixed.transpose(1, 2).reshape(x.shape[0], LENGTH, WIDTH)


class Scale(nn.Module):
    """Elementwise parameters, broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(LENGTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Generated(nn.Module):
    """Layers one after another; those named with `+` have a residual path around them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.mixing = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.names = names
        self.layers = nn.ModuleList(self.make(name.strip("+")) for name in names)

    def make(self, name: str) -> nn.Module:
        makers = {
            "linear": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
            "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
            "norm": lambda: nn.LayerNorm(WIDTH),
            "attention": Attention,
            "tied": nn.Identity,
            "activation": nn.Tanh,
            "scale": Scale,
        }
        return makers[name]()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for name, layer in zip(self.names, self.layers, strict=True):
            y = x @ self.mixing.t() if name.startswith("tied") else layer(x)
            x = x + y if name.endswith("+") else y
        return functional.linear(x, self.embedding.weight)


def build_model(*, layers: str = "linear") -> nn.Module:
    return Generated(layers.split(","))


def example_batch(*, batch: int = 8) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(CLASSES, (batch, LENGTH), generator=generator),)


def loss(output: Tensor, batch: tuple[Tensor]) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), batch[0].flatten())
