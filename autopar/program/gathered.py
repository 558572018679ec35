"""Parameters gathered for use (zero3): gathered again for backward instead of being kept.

`gather_parameter` exposes a sharded parameter. A `Frame` is one run of a segment: one all_gather brings all of its
parameters that need one and the same collective, ahead of the run where the runtime asks for it (forward while the
segment before it computes, backward while the one after it does). Their gradients go back by one reduce_scatter, under
way while backward goes on where nothing else has to be done to them (`GatherScope.deferred`).

While a segment's forward runs inside `GatherScope.forgetting()`, whatever autograd saves that lies in a gathered
tensor's memory is replaced by a note of how to gather it again. Gathered tensors live until the segment's forward is
over, and in backward until their last use. A segment under recompute needs no notes: it saves nothing and gathers when
it is run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autopar.program.collectives import STEP_FUNCTIONS, AxisGroup, slice_copy
from autopar.program.flat import Gather, Scatter, in_groups

GatherSteps = tuple[tuple[str, AxisGroup, tuple[int, ...]], ...]
"""(kinds, axis, dims) of each step: what `STEP_FUNCTIONS` needs."""
Key = tuple[int, GatherSteps]
ALONE_BYTES = 1 << 20
"""Of a shard from which on a parameter has a collective of its own; sliced along dim 0, the result needs no copy."""
WITH_GRADIENT_SUM = "SR"
GATHERING = ("SI", WITH_GRADIENT_SUM)


def _key(parameter: Tensor, steps: GatherSteps) -> Key:
    return parameter.data_ptr(), steps


@dataclass(frozen=True)
class Wanted:
    """A parameter and how to expose it."""

    parameter: Tensor
    steps: GatherSteps
    key: Key

    @property
    def is_single(self) -> bool:
        """One gather along an axis of several ranks does it."""
        return len(self.steps) == 1 and self.steps[0][0] in GATHERING and self.steps[0][1].size > 1

    @property
    def dim(self) -> int:
        return self.steps[0][2][0]


class Batch:
    """Some parameters whose gather is under way, or done."""

    def __init__(self, members: Sequence[Wanted]) -> None:
        self.members = tuple(members)
        ((self.kinds, self.axis, _),) = members[0].steps
        parts = [member.parameter.detach() for member in members]
        self._gather: Gather | None = Gather(parts, self.dims, self.axis)
        self._wholes: dict[Key, Tensor] = {}

    @property
    def dims(self) -> list[int]:
        return [member.dim for member in self.members]

    def wholes(self) -> dict[Key, Tensor]:
        """The gathered tensors that have not been taken out; waits the first time."""
        if self._gather is not None:
            found, self._gather = self._gather.finish(), None
            self._wholes = {member.key: whole for member, whole in zip(self.members, found, strict=True)}
        return self._wholes


def _batches(members: Sequence[Wanted]) -> list[Batch]:
    def kind(member: Wanted) -> object:
        (kinds, axis, _), parameter = member.steps[0], member.parameter
        is_large = parameter.numel() * parameter.element_size() >= ALONE_BYTES
        return kinds, axis.name, parameter.dtype, parameter.requires_grad, member.key if is_large else None

    return [Batch(group) for group in in_groups(members, kind, lambda member: member.parameter, float("inf"))]


@dataclass(eq=False)
class Frame:
    """One run of a segment, forward and backward.

    Attributes:
        wanted: what it gathers.
        previous: frame of the segment before it, to be started ahead in backward.
        ready: batches under way, or done and still of use.
        exposed: gathered for the forward that runs now, and not yet asked for.
        uses: how often backward will ask for each, where it asks by notes.
        has_notes: it does, as opposed to running the segment again.
    """

    wanted: Sequence[Wanted]
    previous: Frame | None = None
    ready: dict[Key, Batch] = field(default_factory=dict)
    exposed: dict[Key, Tensor] = field(default_factory=dict)
    uses: Counter[Key] = field(default_factory=Counter)
    has_notes: bool = False
    is_backward: bool = False

    def start(self) -> None:
        """Start what one collective brings; what takes several is gathered when it is used."""
        members = [
            member
            for member in self.wanted
            if member.is_single and member.key not in self.ready and (self.uses[member.key] or not self.has_notes)
        ]
        for batch in _batches(members):
            self.ready |= {member.key: batch for member in batch.members}

    def enter_backward(self) -> None:
        """At the first need of backward: finish this frame's gathers, then start those needed next.

        What is gathered lies in memory twice until it is finished: not while the next ones are under way too.
        """
        if self.is_backward:
            return
        self.is_backward = True
        self.start()
        if self.previous is not None:
            for batch in self.ready.values():
                batch.wholes()
            self.previous.start()

    def expose(self, key: Key, scope: GatherScope) -> Tensor | None:
        """A parameter for forward, with all of its batch; None where no batch has it."""
        if key not in self.exposed and key in self.ready:
            batch = self.ready[key]
            joined: tuple[Tensor, ...] = _Join.apply(  # type: ignore[no-untyped-call]
                batch, scope, *(member.parameter for member in batch.members)
            )
            for member, whole in zip(batch.members, joined, strict=True):
                self.exposed[member.key] = whole
                del self.ready[member.key]
        return self.exposed.pop(key, None)

    def use(self, key: Key) -> Tensor | None:
        """A parameter for backward; it is let go with its last use."""
        self.enter_backward()
        self.uses[key] -= 1
        batch = self.ready.get(key)
        if batch is None:
            return None
        if self.uses[key]:
            return batch.wholes()[key]
        del self.ready[key]
        return batch.wholes().pop(key)


class _Join(torch.autograd.Function):
    """The whole parameters of a batch; their gradients go back together."""

    @staticmethod
    def forward(ctx: Any, batch: Batch, scope: GatherScope, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.batch, ctx.scope, ctx.parameters = batch, scope, parameters
        ctx.set_materialize_grads(False)
        wholes = batch.wholes()
        return tuple(wholes.pop(member.key) for member in batch.members)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        batch: Batch = ctx.batch
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        given = [gradient for gradient in gradients if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        dims = [batch.dims[i] for i in there]
        if batch.kinds != WITH_GRADIENT_SUM:
            for i, gradient, dim in zip(there, given, dims, strict=True):
                found[i] = slice_copy(gradient, batch.axis, dim)
        elif there:
            leaves = [ctx.parameters[i] for i in there]
            parts = ctx.scope.scatter(leaves, given, dims, batch.axis)
            for i, part in zip(there, parts or (), strict=False):
                found[i] = part
        return None, None, *found


@dataclass(frozen=True)
class _Note:
    """How to make a saved tensor again: gather, then view."""

    wanted: Wanted
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    frame: Frame


@dataclass
class GatherScope:
    """What one stage program gathers.

    Attributes:
        alive: gathered tensors of the segment that runs now, by address of their memory.
        frame: of the segment that runs now.
        deferred: ids of leaves whose gradients may arrive late: `finish` adds them up. The runtime names them.
        pack_others: makes something with a `restore` of what is saved besides gathered parameters, or leaves it.
    """

    alive: dict[int, tuple[Tensor, Wanted]] = field(default_factory=dict)
    is_active: bool = False
    frame: Frame | None = None
    deferred: frozenset[int] = frozenset()
    pack_others: Callable[[Tensor], Any] | None = None
    _late: tuple[Scatter, list[Tensor]] | None = None

    @contextmanager
    def within(self, frame: Frame | None) -> Iterator[None]:
        """Run a segment with what its frame has ready."""
        before, self.frame = self.frame, frame
        try:
            yield
        finally:
            self.frame = before
            if frame is not None:
                frame.exposed.clear()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Run a segment's forward, in a frame, without keeping gathered parameters for backward."""
        assert self.frame is not None
        self.is_active = self.frame.has_notes = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self.is_active = False
            self.alive.clear()

    def _pack(self, tensor: Tensor) -> Any:
        found = self.alive.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor if self.pack_others is None else self.pack_others(tensor)
        _, wanted = found
        assert self.frame is not None
        self.frame.uses[wanted.key] += 1
        return _Note(wanted, tensor.size(), tensor.stride(), int(tensor.storage_offset()), self.frame)

    def scatter(
        self, leaves: list[Tensor], gradients: list[Tensor], dims: Sequence[int], axis: AxisGroup
    ) -> list[Tensor] | None:
        """This rank's slices of the sums of gradients; None if they arrive later."""
        self.finish()
        scatter = Scatter(gradients, dims, axis)
        if all(id(leaf) in self.deferred for leaf in leaves):
            self._late = scatter, leaves
            return None
        return scatter.slices()

    def finish(self) -> None:
        """Wait for gradients that are late, and add them to their leaves."""
        if self._late is None:
            return
        (scatter, leaves), self._late = self._late, None
        for leaf, part in zip(leaves, scatter.slices(), strict=True):
            gradient = part.to(leaf.grad_dtype or part.dtype)
            leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if not isinstance(packed, _Note):
        return packed.restore()  # type: ignore[no-any-return]
    wanted = packed.wanted
    whole = packed.frame.use(wanted.key)
    if whole is None:
        with torch.no_grad():
            whole = apply_steps(wanted.parameter, wanted.steps)
    return whole.as_strided(packed.size, packed.stride, packed.offset)


def gather_parameter(parameter: Tensor, steps: GatherSteps, scope: GatherScope) -> Tensor:
    """The parameter as exposed; its gradient flows back through the conjugates of the steps."""
    key = _key(parameter, steps)
    whole = None if scope.frame is None else scope.frame.expose(key, scope)
    if whole is None:
        whole = apply_steps(parameter, steps)
    if scope.is_active:
        scope.alive[whole.untyped_storage().data_ptr()] = whole, Wanted(parameter.detach(), steps, key)
    return whole


def wanted_of(parameter: Tensor, steps: GatherSteps) -> Wanted:
    return Wanted(parameter, steps, _key(parameter, steps))


def apply_steps(x: Tensor, steps: GatherSteps) -> Tensor:
    """Redistribute step by step."""
    for kinds, axis, dims in steps:
        x = STEP_FUNCTIONS[kinds](x, axis, *dims)
    return x
