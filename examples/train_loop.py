"""A training loop of one's own, run as it stands or distributed.

    python examples/train_loop.py
    torchrun --nproc-per-node 2 examples/train_loop.py

Both print the same losses. `train_step` says how a batch gives a loss; autopar does the rest of the step.
"""

import os

import torch

import autopar


class Classifier(torch.nn.Module):
    """Two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(32, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def build_model(*, width: int = 512) -> Classifier:
    torch.manual_seed(0)
    return Classifier(width)


def example_batch(*, batch: int = 256, step: int = 0) -> dict[str, torch.Tensor]:
    """Points around ten centres; `step` chooses the sample."""
    centres = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(10, (batch,), generator=generator)
    return {"x": centres[labels] + 3.0 * torch.randn(batch, 32, generator=generator), "labels": labels}


def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output, batch["labels"])


@autopar.autoparallel(gpus=2, objective="time", learning_rate=3e-3)
def train_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return loss(model(batch["x"]), batch)


def main(num_steps: int = 50) -> None:
    """Train, and print the loss of each step from the first process."""
    model = build_model()
    for step in range(num_steps):
        value = train_step(model, example_batch(step=step))
        if os.environ.get("RANK", "0") == "0":
            print(f"step {step} loss {value:.6f}", flush=True)


if __name__ == "__main__":
    main()
