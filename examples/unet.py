"""U-Net with skip connections, segmentation of 32 images of 128 x 128 pixels.

Source: Ronneberger et al. 2015, with padded convolutions and group normalisation. `norm=batch` takes batch
normalisation instead.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional


def double_conv(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    """Two 3 x 3 convolutions, each normalised and rectified."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        normed = nn.GroupNorm(8, outputs) if norm == "group" else nn.BatchNorm2d(outputs)
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), normed, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """`levels` resolutions; the channels double as the resolution halves."""

    def __init__(self, width: int, levels: int, classes: int, norm: str) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(double_conv(a, b, norm) for a, b in itertools.pairwise([3, *widths]))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(2 * a, a, 2, stride=2) for a in reversed(widths[:-1]))
        self.up = nn.ModuleList(double_conv(2 * a, a, norm) for a in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        x = images
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for upsample, block in zip(self.upsample, self.up, strict=True):
            x = block(torch.cat([skips.pop(), upsample(x)], dim=1))
        return self.head(x)


def build_model(*, width: int = 64, levels: int = 5, classes: int = 21, norm: str = "group") -> nn.Module:
    return UNet(width, levels, classes, norm)


def example_batch(*, batch: int = 32, image: int = 128, classes: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image, image, generator=generator)
    labels = torch.randint(classes, (batch, image, image), generator=generator)
    return images, labels


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1])
