"""PassRunner: the blocks behind a switch, forward and backward, pass by pass, inside the forward of their stage.

While a pass computes, the samples of the next are on their way, and the gradient of the one before goes back: two
passes' samples are held at a time. What forward leaves for the stage's backward is the gradient of this rank's samples
alone. With updates after each pass the optimizer steps between two passes, for the parameters behind the switch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.graph import Value
from autopar.ir.passes import TURNS, Runs
from autopar.program.collectives import Exchange, SliceOfSum, all_gather_flat
from autopar.program.stage import Behind
from autopar.runtime.stage_runner import StageRunner


class PassRunner:
    """Runs the passes of one rank; see the module docstring."""

    def __init__(
        self,
        behind: Behind,
        state: Mapping[str, Tensor],
        inputs: Sequence[Value],
        *,
        num_microbatches: int,
        samples: int,
        update: Callable[[], None] | None,
    ) -> None:
        """Bind tensors.

        Args:
            behind: of this rank.
            state: parameters (leaves), buffers and constants by value name.
            inputs: batch inputs of the graph.
            num_microbatches: of a step.
            samples: of a microbatch.
            update: called after each pass; None: nothing is updated before the end of the step.
        """
        self.behind = behind
        self.runner = StageRunner(behind.program, state)
        self._dims = {value.name: value.batch_dim for value in inputs}
        self._num_microbatches, self._samples = num_microbatches, samples
        self._update = update

    @property
    def scale(self) -> float:
        """Share of one pass in the loss of the step."""
        return 1.0 / (self.behind.passes.count * self._num_microbatches)

    def feed(self, microbatches: Sequence[Mapping[str, Tensor]]) -> None:
        """Batch inputs of each microbatch of the next step; each pass gets its samples of them."""
        self.runner.feed(
            [
                {name: self._part(name, x, runs) for name, x in microbatch.items()}
                for microbatch in microbatches
                for runs in self.behind.runs
            ]
        )

    def _part(self, name: str, x: Tensor, runs: Runs) -> Tensor:
        dim = self._dims[name]
        if dim is None or name not in self.behind.program.inputs:
            return x
        parts = [x.narrow(dim, first, count) for first, count in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def loss(self, microbatch: int, *crossing: Tensor) -> Tensor:
        """Mean loss of the passes; its backward hands back the gradients that they have left."""
        found: Tensor = _Passes.apply(self, microbatch, *crossing)  # type: ignore[no-untyped-call]
        return found

    def run(self, microbatch: int, crossing: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """All passes over one microbatch: the mean loss, and gradients of what crosses the switch, scaled to the step.

        Parameters behind the switch have their gradients, or have been updated.
        """
        behind, total = self.behind, crossing[0].new_zeros((), dtype=torch.float64)
        sender = _Sender(behind, crossing)
        coming = sender.send(0)
        for index, runs in enumerate(behind.runs):
            given = [coming_x.wait() for coming_x in coming]
            coming = sender.send(index + 1) if index + 1 < len(behind.runs) else []
            loss = self._one_pass(microbatch, runs, given)
            total += loss.double()
            sender.give_back(index, given)
            if self._update is not None:
                self._update()
        return (total / len(behind.runs)).to(loss.dtype), sender.gradients()

    def _one_pass(self, microbatch: int, runs: Runs, given: Sequence[Tensor]) -> Tensor:
        """Forward and backward; the samples given have gradients afterwards."""
        first = microbatch * self._samples
        self.behind.program.stream.runs = tuple((first + start, count) for start, count in runs)
        with torch.enable_grad():
            loss = self.runner(*given)
            # With updates in between, a pass is a batch of its own to the parameters, and a part of one before.
            (loss if self._update is not None else loss * self.scale).backward()
        if self._update is not None:
            for x in given:
                if x.grad is not None:
                    x.grad.mul_(self.scale)
        found: Tensor = loss.detach()
        return found


class _Passes(torch.autograd.Function):
    """`PassRunner.run` as one node, whose backward is done already but for the factor that comes from outside."""

    @staticmethod
    def forward(ctx: Any, runner: PassRunner, microbatch: int, *crossing: Tensor) -> Tensor:
        loss, gradients = runner.run(microbatch, crossing)
        ctx.gradients, ctx.factor = gradients, runner.scale * runner.behind.passes.count
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        factor = outer[0] / ctx.factor
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else g.mul_(factor) for g in gradients)


@dataclass
class _Coming:
    """A tensor under way: `ready` when `work` is done."""

    work: dist.Work | Exchange
    ready: Callable[[], Tensor]

    def wait(self) -> Tensor:
        self.work.wait()
        x = self.ready().detach()
        return x.requires_grad_(x.is_floating_point())


class _Sender:
    """Moves one microbatch's crossing values to the passes, and their gradients back; one pass back at a time."""

    def __init__(self, behind: Behind, crossing: Sequence[Tensor]) -> None:
        self.behind = behind
        self.is_turns = behind.passes.order == TURNS
        self.crossing = [x.detach().contiguous() for x in crossing]
        self.needs = [x.requires_grad for x in crossing]
        self._gradients: list[Tensor | None] = [
            torch.empty_like(x) if needs else None for x, needs in zip(self.crossing, self.needs, strict=True)
        ]
        self._returning: list[Callable[[], None]] = []

    def send(self, index: int) -> list[_Coming]:
        """Start what pass `index` needs."""
        pairs = zip(self.crossing, self.behind.dims, strict=True)
        return [self._turn(x, index) if self.is_turns else self._share(x, dim, index) for x, dim in pairs]

    def _turn(self, x: Tensor, index: int) -> _Coming:
        axis = self.behind.axis
        whole = x.clone() if axis.index == index else torch.empty_like(x)
        work = dist.broadcast(whole, group_src=index, group=axis.process_group, async_op=True)
        return _Coming(work, lambda: whole)

    def _share(self, x: Tensor, dim: int, index: int) -> _Coming:
        axis, mine = self.behind.axis, self._slice(x, dim, index)
        every = x.new_empty((axis.size, *mine.shape))
        own = every[axis.index].copy_(mine)
        work = all_gather_flat(every.view(-1), own.view(-1), axis)
        return _Coming(work, lambda: torch.cat(every.unbind(0), dim) if dim else every.flatten(0, 1))

    def _slice(self, x: Tensor, dim: int, index: int) -> Tensor:
        length = x.shape[dim] // self.behind.passes.count
        return x.narrow(dim, index * length, length)

    def give_back(self, index: int, given: Sequence[Tensor]) -> None:
        """Start the sums of a pass's gradients over the ranks, to those whose samples they are of."""
        self._settle()
        for x, dim, mine in zip(given, self.behind.dims, self._gradients, strict=True):
            if mine is not None:
                gradient = torch.zeros_like(x) if x.grad is None else x.grad.contiguous()
                x.grad = None
                start = self._turn_back if self.is_turns else self._share_back
                self._returning.append(start(gradient, mine, dim, index))

    def _turn_back(self, gradient: Tensor, mine: Tensor, _: int, index: int) -> Callable[[], None]:
        axis = self.behind.axis
        work = dist.reduce(gradient, group_dst=index, group=axis.process_group, async_op=True)

        def finish() -> None:
            work.wait()
            if axis.index == index:
                mine.copy_(gradient)

        return finish

    def _share_back(self, gradient: Tensor, mine: Tensor, dim: int, index: int) -> Callable[[], None]:
        axis, target = self.behind.axis, self._slice(mine, dim, index)
        parts = torch.stack(gradient.chunk(axis.size, dim)) if dim else gradient.view(axis.size, *target.shape)
        coming = SliceOfSum(parts, axis)

        def finish() -> None:
            target.copy_(coming.result().view(target.shape))

        return finish

    def _settle(self) -> None:
        for finish in self._returning:
            finish()
        self._returning.clear()

    def gradients(self) -> list[Tensor | None]:
        """When all have come back: those of this rank's samples; None for what needs none."""
        self._settle()
        return self._gradients
