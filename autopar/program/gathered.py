"""Parameters gathered for use (zero3): gathered again for backward instead of being kept.

`gather_parameter` exposes a sharded parameter. While a segment's forward runs inside `GatherScope.forgetting()`,
whatever autograd saves that lies in a gathered tensor's memory is replaced by a note of how to gather it again; each
use in backward gathers once more. Gathered tensors live until the segment's forward is over. A segment under
recompute needs none of this: it saves nothing and gathers when it is run again.

With prefetching a `Frame` starts the gathers of one run of a segment before that segment runs: forward while the
segment before it computes, backward while the one after it does. Its uses in backward then share one gather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autopar.program.collectives import GATHERING, STEP_FUNCTIONS, AxisGroup, Gathering, start_gather

GatherSteps = tuple[tuple[str, AxisGroup, tuple[int, ...]], ...]
"""(kinds, axis, dims) of each step: what `STEP_FUNCTIONS` needs."""
Key = tuple[int, GatherSteps]


def _key(parameter: Tensor, steps: GatherSteps) -> Key:
    return parameter.data_ptr(), steps


@dataclass(eq=False)
class Frame:
    """One run of a segment, forward and backward.

    Attributes:
        wanted: what it gathers.
        previous: frame of the segment before it.
        ready: gathers under way, or done and still of use.
        uses: how often backward will ask for each, where it asks by notes.
        has_notes: it does, as opposed to running the segment again.
    """

    wanted: Sequence[tuple[Tensor, GatherSteps]]
    previous: Frame | None = None
    ready: dict[Key, Gathering] = field(default_factory=dict)
    uses: Counter[Key] = field(default_factory=Counter)
    has_notes: bool = False
    is_backward: bool = False

    def start(self) -> None:
        """Start what one collective brings; what takes several is gathered when it is used."""
        for parameter, steps in self.wanted:
            ((kinds, axis, dims), *more), key = steps, _key(parameter, steps)
            is_needed = key not in self.ready and (self.uses[key] > 0 or not self.has_notes)
            if is_needed and not more and kinds in GATHERING and axis.size > 1:
                self.ready[key] = start_gather(parameter.detach(), axis, *dims)

    def enter_backward(self) -> None:
        """At the first need of backward: start this frame's gathers, if not started, and those needed next."""
        if self.is_backward:
            return
        self.is_backward = True
        self.start()
        if self.previous is not None:
            self.previous.start()


@dataclass(frozen=True)
class _Note:
    """How to make a saved tensor again: gather, then view."""

    parameter: Tensor
    steps: GatherSteps
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    frame: Frame | None


@dataclass
class GatherScope:
    """Gathered tensors of the segment that runs now, by address of their memory, and its frame if there is one."""

    alive: dict[int, tuple[Tensor, Tensor, GatherSteps]] = field(default_factory=dict)
    is_active: bool = False
    frame: Frame | None = None

    @contextmanager
    def within(self, frame: Frame | None) -> Iterator[None]:
        """Run a segment with what its frame has ready."""
        before, self.frame = self.frame, frame
        try:
            yield
        finally:
            self.frame = before

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Run a segment's forward without keeping gathered parameters for backward."""
        self.is_active = True
        if self.frame is not None:
            self.frame.has_notes = True
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
        if self.frame is not None:
            self.frame.uses[_key(parameter, steps)] += 1
        return _Note(parameter, steps, tensor.size(), tensor.stride(), int(tensor.storage_offset()), self.frame)

    def _unpack(self, packed: Tensor | _Note) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        whole = _whole_again(packed)
        return whole.as_strided(packed.size, packed.stride, packed.offset)


def _whole_again(note: _Note) -> Tensor:
    frame, key = note.frame, _key(note.parameter, note.steps)
    if frame is not None:
        frame.enter_backward()
        frame.uses[key] -= 1
        found = frame.ready.get(key) if frame.uses[key] else frame.ready.pop(key, None)
        if found is not None:
            return found.result()
    with torch.no_grad():
        return apply_steps(note.parameter, note.steps)


def gather_parameter(parameter: Tensor, steps: GatherSteps, scope: GatherScope) -> Tensor:
    """The parameter as exposed; its gradient flows back through the conjugates of the steps."""
    started = None if scope.frame is None else scope.frame.ready.pop(_key(parameter, steps), None)
    if started is None:
        whole = apply_steps(parameter, steps)
    else:
        ((kinds, axis, dims),) = steps
        whole = GATHERING[kinds](parameter, axis, *dims, started)
    if scope.is_active:
        scope.alive[whole.untyped_storage().data_ptr()] = (whole, parameter.detach(), steps)
    return whole


def apply_steps(x: Tensor, steps: GatherSteps) -> Tensor:
    """Redistribute step by step."""
    for kinds, axis, dims in steps:
        x = STEP_FUNCTIONS[kinds](x, axis, *dims)
    return x
