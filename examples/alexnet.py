"""One-tower AlexNet, classification of 1024 images of 224 x 224 pixels (128 on each of 8 devices).

Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", section 5, without its
response normalisation. `width` scales all channels and hidden units (64 is the paper's).
"""

import torch
from torch import nn
from torch.nn import functional


class AlexNet(nn.Module):
    """Convolutions of 1, 3, 6, 6, 4 times `width` channels, then three fully connected layers."""

    def __init__(self, width: int, hidden: int, classes: int, dropout: float, image: int) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, stride=2)
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 11, stride=4, padding=2), nn.ReLU(), pool,
            nn.Conv2d(width, 3 * width, 5, padding=2), nn.ReLU(), pool,
            nn.Conv2d(3 * width, 6 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6 * width, 6 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6 * width, 4 * width, 3, padding=1), nn.ReLU(), pool,
        )  # fmt: skip
        side = (image + 4 - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(4 * width * side * side, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).flatten(1))


def build_model(
    *, width: int = 64, hidden: int = 4096, classes: int = 1000, dropout: float = 0.0, image: int = 224
) -> nn.Module:
    return AlexNet(width, hidden, classes, dropout, image)


def example_batch(*, batch: int = 1024, image: int = 224, classes: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image, image, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return images, labels


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1])
