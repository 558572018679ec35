"""StreamState: where a program is in its random streams, and whether it runs a forward for the second time.

One object belongs to one stage program; the runtime advances it. Random masks depend on (seed, step, op name, sample of
the global batch) alone, never on rank, mesh or microbatches, so every plan of a model drops the same elements; a rank
draws the samples that it has. Of a tensor whose first dim does not hold the samples in equal parts, masks depend on the
microbatch in place of the sample.

A program that runs in passes has parts of a microbatch, in an order of their own: `runs` says which.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.ir.passes import Runs, cut_runs

GROUP = 2**14
"""Numbers that are drawn with one seed at the least."""


@dataclass
class StreamState:
    """Mutable position.

    Attributes:
        seed: of the whole run.
        step, microbatch: counted from 0.
        samples: in a microbatch.
        is_recomputing: a forward that only restores activations: buffers must not be updated again.
        runs: which samples of the global batch the `samples` of this pass are; (): those of the microbatch in order.
    """

    seed: int = 0
    step: int = 0
    microbatch: int = 0
    is_recomputing: bool = False
    samples: int = 1
    runs: Runs = ()

    @contextmanager
    def at(self, microbatch: int, *, is_recomputing: bool) -> Iterator[None]:
        """Run the body as part of this microbatch's forward."""
        before = self.microbatch, self.is_recomputing
        self.microbatch, self.is_recomputing = microbatch, is_recomputing
        try:
            yield
        finally:
            self.microbatch, self.is_recomputing = before

    def uniform(self, op_name: str, shape: Sequence[int], start: int, length: int, device: torch.device) -> Tensor:
        """Rows `start .. start + length - 1` of numbers from [0, 1) for a tensor of one microbatch, drawn for one op.

        Neighbouring samples with few numbers are drawn together, so that no generator is seeded for less than GROUP.
        """
        rows = shape[0] // self.samples if shape[0] % self.samples == 0 else shape[0]
        group = rows * max(1, GROUP // max(1, rows * math.prod(shape[1:])))
        if self.runs and shape[0] % self.samples == 0:
            held = [(first * rows, count * rows) for first, count in self.runs]
            pieces = [self._rows(op_name, shape, group, *run, device) for run in cut_runs(held, start, length)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return self._rows(op_name, shape, group, self.microbatch * shape[0] + start, length, device)

    def _rows(  # noqa: PLR0917 - a position and a length
        self, op_name: str, shape: Sequence[int], group: int, first: int, length: int, device: torch.device
    ) -> Tensor:
        """Rows from `first` on, counted over the global batch, drawn by groups."""
        generator, parts = torch.Generator(device), []
        for index in range(first // group, -(-(first + length) // group)):
            generator.manual_seed(self._seed(f"{op_name}/{index}"))
            parts.append(torch.rand((group, *shape[1:]), generator=generator, device=device))
        drawn = parts[0] if len(parts) == 1 else torch.cat(parts)
        return drawn.narrow(0, first % group, length)

    def _seed(self, name: str) -> int:
        """SHA-256 of the position."""
        key = f"{self.seed}/{self.step}/{name}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def buffer_for_update(buffer: Tensor, stream: StreamState) -> Tensor:
    """The buffer that an op may change in place: a copy while recomputing, so that it changes once."""
    return buffer.clone() if stream.is_recomputing else buffer
