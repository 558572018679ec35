"""Wide ResNet-101: bottlenecks whose inner convolutions are `factor` times as wide; for `benchmarks/energy.py`.

Zagoruyko and Komodakis 2016, in the form of He et al. 2016. With factor 1 it is a plain ResNet, of other sizes for
`benchmarks/execution.py`: `depths` counts the bottlenecks of each group, `width` the channels of the first.
"""

import torch
from torch import Tensor, nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with norms beside a shortcut."""

    def __init__(self, fed: int, planes: int, factor: int, stride: int) -> None:
        super().__init__()
        inner, out = planes * factor, planes * EXPANSION
        self.conv1, self.norm1 = nn.Conv2d(fed, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        has_change = stride != 1 or fed != out
        self.short = (
            nn.Sequential(nn.Conv2d(fed, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if has_change
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu(self.norm3(self.conv3(y)) + self.short(x))


class WideResNet(nn.Module):
    """Returns the loss."""

    def __init__(self, factor: int, classes: int, depths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        fed = width
        for group, depth in enumerate(depths):
            for place in range(depth):
                blocks.append(Bottleneck(fed, width << group, factor, 2 if group and not place else 1))
                fed = (width << group) * EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(fed, classes)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        features = self.blocks(self.stem(pixels)).mean((2, 3))
        return nn.functional.cross_entropy(self.head(features), labels)


def build_model(*, factor: int = 8, classes: int = 1000, depths: str = "3,4,23,3", width: int = 64) -> nn.Module:
    return WideResNet(factor, classes, tuple(int(depth) for depth in depths.split(",")), width)


def example_batch(*, batch: int = 64, image: int = 224, classes: int = 1000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, image, image, generator=generator)
    return {"pixels": pixels, "labels": torch.randint(classes, (batch,), generator=generator)}
