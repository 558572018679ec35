"""ResNet-50, classification of 256 images of 224 x 224 pixels.

Source: He et al. 2016, table 1; sizes of the Hugging Face config `microsoft/resnet-50`. `width` scales all channels
(64 is ResNet-50); `layers` is the number of residual layers in the third stage (6 is ResNet-50).
"""

import torch
from transformers import ResNetConfig, ResNetForImageClassification


def build_model(*, layers: int = 6, width: int = 64, classes: int = 1000) -> torch.nn.Module:
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[4 * width, 8 * width, 16 * width, 32 * width],
        depths=[min(3, layers), min(4, layers), layers, min(3, layers)],
        num_labels=classes,
        problem_type="single_label_classification",
    )
    return ResNetForImageClassification(config)


def example_batch(*, batch: int = 256, image: int = 224, classes: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, image, image, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return {"pixel_values": pixels, "labels": labels}
