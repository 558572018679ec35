"""Parameters gathered for use (zero3): gathered again for backward instead of being kept.

`gather_parameter` exposes a sharded parameter. While a segment's forward runs inside `GatherScope.forgetting()`,
whatever autograd saves that lies in a gathered tensor's memory is replaced by a note of how to gather it again; each
use in backward gathers once more. Gathered tensors live until the segment's forward is over. A segment under
recompute needs none of this: it saves nothing and gathers when it is run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autopar.program.collectives import STEP_FUNCTIONS, AxisGroup

GatherSteps = tuple[tuple[str, AxisGroup, tuple[int, ...]], ...]
"""(kinds, axis, dims) of each step: what `STEP_FUNCTIONS` needs."""


@dataclass(frozen=True)
class _Note:
    """How to make a saved tensor again: gather, then view."""

    parameter: Tensor
    steps: GatherSteps
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class GatherScope:
    """Gathered tensors of the segment that runs now, by address of their memory."""

    alive: dict[int, tuple[Tensor, Tensor, GatherSteps]] = field(default_factory=dict)
    is_active: bool = False

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Run a segment's forward without keeping gathered parameters for backward."""
        self.is_active = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self.is_active = False
            self.alive.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Note:
        found = self.alive.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        _, parameter, steps = found
        return _Note(parameter, steps, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Tensor | _Note) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            whole = apply_steps(packed.parameter, packed.steps)
        return whole.as_strided(packed.size, packed.stride, packed.offset)


def gather_parameter(parameter: Tensor, steps: GatherSteps, scope: GatherScope) -> Tensor:
    """The parameter as exposed; its gradient flows back through the conjugates of the steps."""
    whole = apply_steps(parameter, steps)
    if scope.is_active:
        scope.alive[whole.untyped_storage().data_ptr()] = (whole, parameter.detach(), steps)
    return whole


def apply_steps(x: Tensor, steps: GatherSteps) -> Tensor:
    """Redistribute step by step."""
    for kinds, axis, dims in steps:
        x = STEP_FUNCTIONS[kinds](x, axis, *dims)
    return x
