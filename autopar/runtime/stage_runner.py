"""StageRunner: runs a stage program's segments on one microbatch, and is the module that the pipeline engine calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autopar.program.recompute import checkpointed
from autopar.program.stage import LOSS_OUTPUT, Segment, StageProgram


class StageRunner(nn.Module):
    """One stage on one rank. `feed` gives it the microbatches of a step; `forward` takes the next of them.

    Forwards must come in microbatch order, as every schedule here calls them.
    """

    def __init__(self, program: StageProgram, state: Mapping[str, Tensor]) -> None:
        """Bind tensors.

        Args:
            program: of this rank.
            state: parameters (leaves), buffers and constants by value name.
        """
        super().__init__()
        self.program = program
        self._state = dict(state)
        self._microbatches: Sequence[Mapping[str, Tensor]] = ()
        self._next = 0
        self._last_use = _last_uses(program)

    def feed(self, microbatches: Sequence[Mapping[str, Tensor]]) -> None:
        """Batch inputs of each microbatch of the next step, by value name."""
        self._microbatches = microbatches
        self._next = 0

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The loss on the last stage, else what is sent on: contiguous, and never a received tensor itself."""
        program = self.program
        microbatch, self._next = self._next, self._next + 1
        values = self._state | dict(self._microbatches[microbatch])
        values |= {tensor.name: x for tensor, x in zip(program.received, received, strict=True)}
        if program.shared is not None:
            with program.stream.at(microbatch, is_recomputing=False):
                self._run(program.shared, values)
        for index, segment in enumerate(program.segments):
            self._run_block(segment, values, microbatch)
            for name in self._last_use[index]:
                values.pop(name, None)
        if program.is_last:
            return values[LOSS_OUTPUT]
        return tuple(_detached_alias(values[tensor.name]) for tensor in program.sent)

    def _run_block(self, segment: Segment, values: dict[str, Tensor], microbatch: int) -> None:
        program = self.program
        if segment.runs_again and torch.is_grad_enabled():
            inputs = [values[name] for name in segment.inputs]
            outputs = checkpointed(lambda: segment.module.forward(*inputs), program.stream, program.keeper, microbatch)
            values.update(zip(segment.outputs, outputs, strict=True))
            return
        with program.stream.at(microbatch, is_recomputing=False):
            if segment.gathers:
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


def _last_uses(program: StageProgram) -> tuple[tuple[str, ...], ...]:
    """Values made by segments that nothing reads after each segment."""
    keep = {tensor.name for tensor in program.sent} | {LOSS_OUTPUT}
    last: dict[str, int] = {}
    for index, segment in enumerate(program.segments):
        for name in (*segment.inputs, *segment.outputs):
            last[name] = index
    return tuple(
        tuple(name for name, when in last.items() if when == index and name not in keep)
        for index in range(len(program.segments))
    )
