"""StageRunner: runs a stage program's segments on one microbatch, and is the module that the pipeline engine calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autopar.program.gathered import Frame, wanted_of
from autopar.program.recompute import checkpointed
from autopar.program.stage import LOSS_OUTPUT, Segment, StageProgram, left_name
from autopar.runtime.activations import OffloadedActivations

if TYPE_CHECKING:
    from autopar.runtime.passes import PassRunner


class StageRunner(nn.Module):
    """One stage on one rank. `feed` gives it the microbatches of a step; `forward` takes the next of them.

    Forwards must come in microbatch order, as every schedule here calls them.
    """

    def __init__(
        self,
        program: StageProgram,
        state: Mapping[str, Tensor],
        *,
        prefetch: bool = False,
        activations: OffloadedActivations | None = None,
        behind: PassRunner | None = None,
    ) -> None:
        """Bind tensors.

        Args:
            program: of this rank.
            state: parameters (leaves), buffers and constants by value name.
            prefetch: gather the parameters of a segment while its neighbour computes.
            activations: takes what autograd saves elsewhere; None: it stays.
            behind: runs what of the stage runs in passes.
        """
        super().__init__()
        self.program = program
        self._state = dict(state)
        self._microbatches: Sequence[Mapping[str, Tensor]] = ()
        self._next = 0
        self._last_use = _last_uses(program)
        self._prefetch = prefetch
        self._activations = activations
        program.scope.pack_others = None if activations is None else activations.pack
        self._behind = behind
        self._wanted = [
            [wanted_of(self._state[name], steps) for name, steps in segment.gathered] for segment in program.segments
        ]

    def feed(self, microbatches: Sequence[Mapping[str, Tensor]]) -> None:
        """Batch inputs of each microbatch of the next step, by value name."""
        self._microbatches = microbatches
        self._next = 0
        if self._behind is not None:
            self._behind.feed(microbatches)

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The loss on the last stage, else what is sent on: contiguous, and never a received tensor itself."""
        values = self.run_blocks(received)
        if self._behind is not None:
            return self._behind.loss(self._next - 1, *(values[tensor.name] for tensor in self.program.sent))
        if self.program.is_last:
            return _alone(values[LOSS_OUTPUT])
        return tuple(_detached_alias(values[tensor.name]) for tensor in self.program.sent)

    def run_blocks(self, received: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run the next microbatch; values that are sent on or leave, and others that no block made."""
        program = self.program
        microbatch, self._next = self._next, self._next + 1
        values = self._state | dict(self._microbatches[microbatch])
        values |= {tensor.name: x for tensor, x in zip(program.received, received, strict=True)}
        if self._activations is not None:
            self._activations.begin(values.values())
        if program.shared is not None:
            with program.stream.at(microbatch, is_recomputing=False):
                self._run(program.shared, values)
        frames = self._frames()
        for index, segment in enumerate(program.segments):
            self._start_gathers(frames, index)
            self._run_block(segment, values, microbatch, frames[index])
            for name in self._last_use[index]:
                values.pop(name, None)
        return values

    def _frames(self) -> list[Frame | None]:
        """A frame for each segment of this microbatch that gathers."""
        frames: list[Frame | None] = []
        previous: Frame | None = None
        for wanted in self._wanted:
            frame = Frame(wanted, previous if self._prefetch else None) if wanted else None
            frames.append(frame)
            previous = frame or previous
        return frames

    def _start_gathers(self, frames: list[Frame | None], index: int) -> None:
        """Of a segment that is about to run and, under prefetching, of the next one that gathers."""
        own = frames[index]
        if own is not None:
            own.start()
        after = next((frame for frame in frames[index + 1 :] if frame is not None), None)
        if self._prefetch and after is not None:
            after.start()

    def _run_block(self, segment: Segment, values: dict[str, Tensor], microbatch: int, frame: Frame | None) -> None:
        program = self.program
        if segment.runs_again and torch.is_grad_enabled():
            inputs = [values[name] for name in segment.inputs]

            def run() -> tuple[Tensor, ...]:
                if frame is not None and program.keeper.is_second_run:
                    frame.enter_backward()
                with program.scope.within(frame):
                    return segment.module.forward(*inputs)  # type: ignore[no-any-return]

            outputs = checkpointed(run, program.stream, program.keeper, microbatch)
            values.update(zip(segment.outputs, outputs, strict=True))
            return
        away = nullcontext() if self._activations is None else self._activations.offloading()
        with program.stream.at(microbatch, is_recomputing=False), program.scope.within(frame), away:
            if segment.gathered:
                with program.scope.forgetting():
                    self._run(segment, values)
            else:
                self._run(segment, values)

    def _run(self, segment: Segment, values: dict[str, Tensor]) -> None:
        outputs = segment.module.forward(*(values[name] for name in segment.inputs))
        values.update(zip(segment.outputs, outputs, strict=True))


def _detached_alias(x: Tensor) -> Tensor:
    """A new autograd node over the same data, so that a value passed through is not the received leaf."""
    return x.contiguous().view_as(x)


def _alone(loss: Tensor) -> Tensor:
    """The loss in memory of its own, since it is kept to the end of the step: some of torch's losses return one element
    of all the terms.
    """
    return loss.clone() if loss.untyped_storage().nbytes() > loss.nbytes else loss


def _last_uses(program: StageProgram) -> tuple[tuple[str, ...], ...]:
    """Values made by segments that nothing reads after each segment."""
    keep = {tensor.name for tensor in program.sent} | {LOSS_OUTPUT} | {left_name(name) for name in program.leaving}
    last: dict[str, int] = {}
    for index, segment in enumerate(program.segments):
        for name in (*segment.inputs, *segment.outputs):
            last[name] = index
    return tuple(
        tuple(name for name, when in last.items() if when == index and name not in keep)
        for index in range(len(program.segments))
    )
