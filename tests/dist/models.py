"""Small models whose captured graphs hold the ops that matter to execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.capture.export import Captured
from autopar.capture.model_source import ModelSource
from autopar.capture.promote import promote
from autopar.capture.source import load_source
from autopar.planner.materialise import capture_for_run, sized_batch

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


class Skip(nn.Module):
    """An early value, and a mask without gradient, that the last layer reads again, past all layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = x = torch.tanh(self.layers[0](x))
        is_positive = early > 0
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return self.last(torch.where(is_positive, x * early, x))


class Deep(nn.Module):
    """Nine layers over [batch, channel, width], norms over the batch; the last shares its weights with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.tanh(norm(layer(x)))
        return self.layers[0](x)


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
    "skip": _source("skip", Skip, lambda: (torch.randn(BATCH, 8), torch.randn(BATCH, 4)), _square_loss),
    "deep": _source("deep", Deep, lambda: (torch.randn(BATCH, 8, 8), torch.randn(BATCH, 8, 8)), _square_loss),
    "transformer": _source("transformer", Transformer, _tokens, _token_loss),
    "dropout": _source("dropout", lambda: Transformer(0.3), _tokens, _token_loss),
    "conv": _source("conv", ConvNet, lambda: (torch.randn(BATCH, 2, 8, 8), torch.randint(0, 4, (BATCH,))), _class_loss),
}


EXAMPLES: dict[str, dict[str, int | str]] = {
    "gpt2": {"layers": 2, "hidden": 32, "heads": 4, "seq": 8, "vocab": 64},
    "llama": {
        "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "seq": 8, "vocab": 64, "dtype": "float32",
    },
    "bert": {"layers": 2, "hidden": 32, "heads": 4, "seq": 8, "vocab": 64},
    "vit": {"layers": 2, "hidden": 32, "heads": 4, "image": 16, "patch": 4, "classes": 8},
    "resnet": {"layers": 1, "width": 8, "classes": 8, "image": 32},
    "alexnet": {"width": 8, "hidden": 32, "classes": 8, "image": 64},
    "t5": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "vocab": 64, "seq": 8, "target": 8},
    "mixtral": {
        "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "experts": 4, "seq": 8, "vocab": 64,
        "dtype": "float32",
    },
    "unet": {"width": 8, "levels": 2, "classes": 4, "image": 16},
    "mlp": {"inputs": 32, "hidden": 64, "layers": 2, "code": 16},
}  # fmt: skip
"""Sizes at which the example models run in a test."""
ROOT = Path(__file__).parents[2]


def source(name: str) -> ModelSource:
    """`toy/NAME` is a model of this file, any other name an example."""
    if name.startswith("toy/"):
        return SOURCES[name.removeprefix("toy/")]
    options = {key: str(value) for key, value in (EXAMPLES[name] | {"batch": BATCH}).items()}
    return load_source(str(ROOT / "examples" / f"{name}.py"), options)


def captured(name: str, batch_size: int) -> Captured:
    """The model with weights that depend on its name alone; its graph is in float64."""
    torch.manual_seed(0)
    found = capture_for_run(source(name), batch_size=batch_size, device="cpu")
    return replace(found, graph=promote(found.graph, "float64"))


def global_batch(name: str) -> list[Tensor]:
    """Inputs of one whole batch in graph order, in float64."""
    torch.manual_seed(1)
    return [as_double(tensor) for tensor in sized_batch(source(name), BATCH, "cpu")]


def as_double(tensor: Tensor) -> Tensor:
    """Floats become float64, all else stays."""
    return tensor.double() if tensor.is_floating_point() else tensor
