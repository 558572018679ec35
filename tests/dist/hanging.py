"""The model of `benchmarks/models/points.py`, on ranks of which one leaves in the midst of a step; a script's own loop.

What it does is in the environment: `HANG_RANK` does `HANG_HOW` (`sleep`, `stop` or `kill`) at its 8th update, once if
`HANG_ONCE` names a file, which it makes. As a script under torchrun: trains with `@autoparallel` to step 20, with a
checkpoint in `HANG_KEPT` after every fifth step, and prints each loss.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

import autopar
from benchmarks.models import points
from benchmarks.models.points import build_model, dataset, example_batch, loss

__all__ = ["build_model", "dataset", "example_batch", "loss"]
AT = 8
STEPS = 20
EVERY = 5
_updates = itertools.count(1)


def _leave(*_: Any) -> None:
    if next(_updates) != AT or os.environ.get("RANK") != os.environ["HANG_RANK"]:
        return
    once = os.environ.get("HANG_ONCE")
    if once is not None and Path(once).exists():
        return
    if once is not None:
        Path(once).touch()
    if os.environ["HANG_HOW"] != "sleep":
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[os.environ["HANG_HOW"]])
    time.sleep(10_000)


if "HANG_RANK" in os.environ:
    register_optimizer_step_pre_hook(_leave)


@autopar.autoparallel(gpus=2, learning_rate=1e-2, timeout_s=25.0)
def train_step(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    """The script's loop: starts, or goes on."""
    torch.manual_seed(0)
    model, samples = points.build_model(width=32), points.dataset(samples=400)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [samples[(16 * step + i) % len(samples)] for i in range(16)]
        return torch.stack([x for x, _ in rows]), torch.tensor([label for _, label in rows])

    kept = os.environ["HANG_KEPT"]
    for step in range(train_step.resume(model, batch(0), kept), STEPS):
        value = train_step(model, batch(step))
        if os.environ.get("RANK", "0") == "0":
            print(f"step {step} loss {value!r}", flush=True)
        if (step + 1) % EVERY == 0:
            train_step.save(kept)


if __name__ == "__main__":
    main()
