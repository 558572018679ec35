"""Work that draws power on a GPU: large matrix products on random data, and copies within its memory.

Power depends on the bits that are multiplied (arXiv 2409.18324): zeros would measure a machine that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autopar.meters import EnergyMeter, Repeated, WindowRules, measure_repeated

SIZE = 8192
"""Of the square matrices, which fill every multiprocessor; three of them take 0.4 GB in 16 bits."""
STREAM_BYTES = 2**30
BATCH = 8
"""Runs between two synchronisations, so that gaps between kernels do not lower the power."""


def products(device: str, meter: EnergyMeter, rules: WindowRules) -> Callable[[], Repeated]:
    """Products in bfloat16, or in float16 where the GPU has no other 16 bits."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    left, right = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: _repeat(lambda: torch.mm(left, right, out=out), device, meter, rules)


def streams(device: str, meter: EnergyMeter, rules: WindowRules) -> Callable[[], Repeated]:
    """Copies of one buffer into another."""
    source = torch.randn(STREAM_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return lambda: _repeat(lambda: target.copy_(source), device, meter, rules)


def make_context(device: str) -> None:
    """A context on the GPU, which from then on draws blocked power."""
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)


def _repeat(run: Callable[[], object], device: str, meter: EnergyMeter, rules: WindowRules) -> Repeated:
    def batch() -> None:
        for _ in range(BATCH):
            run()

    return measure_repeated(batch, meter, rules, synchronise=lambda: torch.cuda.synchronize(device))
