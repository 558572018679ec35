"""StreamState: where a program is in its random streams, and whether it runs a forward for the second time.

One object belongs to one stage program; the runtime advances it. Random masks depend on (seed, step, microbatch, op
name) alone, never on the rank or the mesh, so every plan of a model drops the same elements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StreamState:
    """Mutable position.

    Attributes:
        seed: of the whole run.
        step, microbatch: counted from 0.
        is_recomputing: a forward that only restores activations: buffers must not be updated again.
    """

    seed: int = 0
    step: int = 0
    microbatch: int = 0
    is_recomputing: bool = False

    @contextmanager
    def at(self, microbatch: int, *, is_recomputing: bool) -> Iterator[None]:
        """Run the body as part of this microbatch's forward."""
        before = self.microbatch, self.is_recomputing
        self.microbatch, self.is_recomputing = microbatch, is_recomputing
        try:
            yield
        finally:
            self.microbatch, self.is_recomputing = before

    def generator(self, op_name: str, device: torch.device) -> torch.Generator:
        """Generator of one op in this microbatch: seeded by SHA-256 of the position."""
        key = f"{self.seed}/{self.step}/{self.microbatch}/{op_name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        return torch.Generator(device).manual_seed(seed)


def buffer_for_update(buffer: Tensor, stream: StreamState) -> Tensor:
    """The buffer that an op may change in place: a copy while recomputing, so that it changes once."""
    return buffer.clone() if stream.is_recomputing else buffer
