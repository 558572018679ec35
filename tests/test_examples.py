"""The example models: their size at the defaults is the published one, and their batches can be executed."""

from __future__ import annotations

import pytest
import torch

from autopar.capture.source import load_source
from tests.capture.models import EXAMPLES, NAMES, source

MILLION_PARAMETERS = {
    "gpt2": 124.44,  # Hugging Face model card `gpt2`
    "llama": 8030.26,  # model card Meta-Llama-3-8B
    "bert": 109.51,  # bert-base-uncased with the masked language model head
    "vit": 86.57,  # Dosovitskiy et al. 2021, table 1: 86M
    "resnet": 25.56,  # torchvision resnet50
    "t5": 222.90,  # t5-base
    "mixtral": 46702.79,  # model card Mixtral-8x7B-v0.1
    "alexnet": 61.8,  # hand count: 3.75M in convolutions, 58.1M in fully connected layers
    "unet": 31.0,  # Ronneberger et al. 2015: 31.0M
    "mlp": 23.1,  # hand count: 1024 x 4096 + 4096 x 4096 + 4096 x 512 weights and their biases
}


@pytest.mark.parametrize("name", NAMES)
def test_default_size_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = load_source(str(EXAMPLES / f"{name}.py")).build_model()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(MILLION_PARAMETERS[name], rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_valid_and_repeatable(name: str) -> None:
    first, second = source(name).example_batch(), source(name).example_batch()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80
    assert lines[0].startswith('"""')
