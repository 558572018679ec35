"""Small models whose captured graphs hold the ops that matter to execution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.capture.export import Captured, capture
from autopar.capture.source import ModelSource

BATCH = 8


class Mlp(nn.Module):
    """Linear layers and a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.middle = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for layer in self.middle:
            x = x + torch.tanh(layer(x))
        return self.last(x)


class Transformer(nn.Module):
    """A tied language model with two attention layers and dropout as asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.position = nn.Embedding(4, 16)
        self.layers = nn.ModuleList(_Layer(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.norm(x), self.embedding.weight)


class _Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        x = x + functional.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), self.dropout)
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class ConvNet(nn.Module):
    """Convolutions with batch norm (buffers, statistics over the batch), pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[0](self.first(x)))
        x = x + torch.relu(self.norms[1](self.second(x)))
        x = functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 32, (BATCH, 4)), torch.randint(0, 32, (BATCH, 4))


def _token_loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def _class_loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.cross_entropy(output, batch[1])


def _square_loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    return ((output - batch[1]) ** 2).mean()


def _source(name: str, build: Callable[[], nn.Module], batch: Callable[[], object], loss: object) -> ModelSource:
    return ModelSource(name, name, build, batch, loss)  # type: ignore[arg-type]


SOURCES = {
    "mlp": _source("mlp", Mlp, lambda: (torch.randn(BATCH, 8), torch.randn(BATCH, 4)), _square_loss),
    "transformer": _source("transformer", Transformer, _tokens, _token_loss),
    "dropout": _source("dropout", lambda: Transformer(0.3), _tokens, _token_loss),
    "conv": _source("conv", ConvNet, lambda: (torch.randn(BATCH, 2, 8, 8), torch.randint(0, 4, (BATCH,))), _class_loss),
}


def captured(name: str, batch_size: int) -> Captured:
    """The model in float64 with weights that depend on its name alone."""
    torch.manual_seed(0)
    return capture(SOURCES[name], batch_size=batch_size, device="cpu", dtype=torch.float64)


def global_batch(name: str) -> list[Tensor]:
    """Inputs of one whole batch in graph order."""
    torch.manual_seed(1)
    return [t.double() if t.is_floating_point() else t for t in SOURCES[name].batch_maker()]
