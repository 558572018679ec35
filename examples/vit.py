"""ViT-B/16, classification of 256 images of 224 x 224 pixels.

Source: Dosovitskiy et al. 2021, table 1; sizes of the Hugging Face config `google/vit-base-patch16-224`.
"""

import torch
from transformers import ViTConfig, ViTForImageClassification


def build_model(
    *, layers: int = 12, hidden: int = 768, heads: int = 12, image: int = 224, patch: int = 16, classes: int = 1000
) -> torch.nn.Module:
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=image,
        patch_size=patch,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",
    )
    return ViTForImageClassification(config)


def example_batch(*, batch: int = 256, image: int = 224, classes: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, image, image, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return {"pixel_values": pixels, "labels": labels}
