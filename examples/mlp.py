"""An autoencoder of fully connected layers whose decoder reuses the encoder's weights, transposed.

Source: tied weights as in Vincent et al. 2010 (stacked denoising autoencoders); the sizes are ours.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional


class TiedAutoencoder(nn.Module):
    """Encoder widths `sizes[0] -> ... -> sizes[-1]`, and the same way back with the same matrices."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.decoder_biases = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = functional.relu(layer(x))
        for layer, bias in zip(reversed(self.layers), reversed(self.decoder_biases), strict=True):
            x = functional.linear(x, layer.weight.t(), bias)
            x = functional.relu(x) if layer is not self.layers[0] else x
        return x


def build_model(*, inputs: int = 1024, hidden: int = 4096, layers: int = 3, code: int = 512) -> nn.Module:
    return TiedAutoencoder([inputs, *[hidden] * (layers - 1), code])


def example_batch(*, batch: int = 256, inputs: int = 1024) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, inputs, generator=generator),)


def loss(output: torch.Tensor, batch: tuple[torch.Tensor]) -> torch.Tensor:
    return functional.mse_loss(output, batch[0])
