"""What a plan with passes needs at run time: the graph of a pass, and the serial step that its numbers are those of.

With updates after each pass that step is no longer the serial model's: the blocks behind the switch are trained with
smaller batches than those before. The reference then does the same on one process, in plain loops over samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from autopar.errors import InputError
from autopar.ir.graph import OpGraph
from autopar.ir.passes import EACH_PASS, Runs, samples_of
from autopar.ir.plan import Plan
from autopar.ir.run import RunSettings
from autopar.ir.solution import Decisions, StageChoice
from autopar.planner.passes import find_switch

if TYPE_CHECKING:
    import torch

    from autopar.capture.model_source import ModelSource
    from autopar.runtime.compare import Agreement
    from autopar.runtime.executor import Executor

LEARNING_RATE = 0.1
"""Of the plain gradient descent in which `verify` compares updates."""


def is_updated_in_passes(decisions: Decisions) -> bool:
    """Some parameters change between the passes of a step."""
    return decisions.passes is not None and decisions.passes.update == EACH_PASS


def updates_words(decisions: Decisions) -> str:
    """What `verify` compares of parameters that change within a step; "": none does."""
    if not is_updated_in_passes(decisions) or decisions.passes is None:
        return ""
    count = decisions.passes.count * decisions.num_microbatches
    how = f"SGD, rate {LEARNING_RATE:g}"
    return f"{count} a step behind the switch ({how}): changes compared, with a serial step that does so"


def check_settings(plan: Plan, settings: RunSettings) -> None:
    """Raises InputError for what a run cannot do with a plan that updates in passes."""
    if is_updated_in_passes(plan.decisions) and settings.clip_norm is not None:
        raise InputError(
            "--clip-norm needs all gradients of a step at once, but the plan updates behind its switch after each pass "
            "(fc_update=pass): leave one of the two out"
        )


def graph_of_pass(plan: Plan, source: ModelSource) -> OpGraph | None:
    """The model captured at the size of a pass; None for a plan without passes.

    Raises:
        InputError: a microbatch does not divide into the passes.
    """
    from autopar.planner.materialise import graph_of_part

    passes = plan.decisions.passes
    if passes is None:
        return None
    size, rest = divmod(plan.model.batch_size, plan.decisions.num_microbatches * passes.count)
    if rest:
        raise InputError(f"a batch of {plan.model.batch_size} does not divide into {passes.count} passes a microbatch")
    return graph_of_part(source, size)


@dataclass(frozen=True)
class SerialPasses:
    """A step on one process in the passes of a plan, updating behind the switch after each by gradient descent.

    Attributes:
        loss: mean over passes and microbatches.
        gradients: of the parameters before the switch, by value name.
        changes: of the parameters behind it, what the step has added to them.
    """

    loss: float
    gradients: Mapping[str, torch.Tensor | None]
    changes: Mapping[str, torch.Tensor]


class SerialStep:
    """The reference of a plan that updates in passes, on this process alone."""

    def __init__(
        self, graph: OpGraph, behind: OpGraph, decisions: Decisions, state: Mapping[str, torch.Tensor], seed: int
    ) -> None:
        """Build it.

        Args:
            graph, behind: captured at the size of a microbatch and of a pass.
            state: whole parameters, buffers and constants by value name; left alone.
            seed: of the random streams.
        """
        from autopar.rewrite.passes import without_updates
        from autopar.rewrite.program import build_stage, serial_decisions
        from autopar.runtime.stage_runner import StageRunner

        passes, switch = decisions.passes, find_switch(graph, decisions)
        assert passes is not None
        self.graph, self.state, self.count = graph, state, decisions.num_microbatches
        halves = (StageChoice(0, passes.block, "none"), StageChoice(passes.block, len(graph.blocks), "none"))
        alone = replace(serial_decisions(graph, self.count), stages=halves)
        device = next(iter(state.values())).device
        self.before = build_stage(graph, alone, 0, (), device=str(device), seed=seed)
        self.behind = build_stage(without_updates(behind), alone, 1, (), device=str(device), seed=seed)
        self.leaves = {name: x.detach().clone() for name, x in state.items()}
        self.trained = [value.name for value in graph.parameters if value.requires_grad]
        for name in self.trained:
            self.leaves[name].requires_grad_()
        self.changing = [name for name in self.behind.parameters if name in self.trained]
        self.runners = [StageRunner(program, self.leaves) for program in (self.before, self.behind)]
        dims, ranks = switch.dims, decisions.mesh.sizes[switch.axis]
        self.dims = [dims[tensor.name] or 0 for tensor in self.before.sent]
        self.passes = [
            samples_of(passes, i, samples=graph.batch_size, ranks=ranks, outer=switch.outer)
            for i in range(passes.count)
        ]

    def run(self, batch: Sequence[torch.Tensor]) -> SerialPasses:
        """One step on the whole batch, in graph order."""
        size, every = self.graph.batch_size, range(self.count)
        firsts = [m * size for m in every]
        self.runners[0].feed([self._inputs(batch, ((first, size),)) for first in firsts])
        shifted = [[_shifted(runs, first) for runs in self.passes] for first in firsts]
        self.runners[1].feed([self._inputs(batch, runs) for own in shifted for runs in own])
        losses = [loss for first, own in zip(firsts, shifted, strict=True) for loss in self._microbatch(first, own)]
        changes = {name: self.leaves[name].detach() - self.state[name] for name in self.changing}
        gradients = {name: self.leaves[name].grad for name in self.trained if name not in changes}
        return SerialPasses(sum(losses) / len(losses), gradients, changes)

    def _inputs(self, batch: Sequence[torch.Tensor], runs: Runs) -> dict[str, torch.Tensor]:
        values = self.graph.outside("input")
        return {
            value.name: x if value.batch_dim is None else _rows(x, value.batch_dim, runs)
            for value, x in zip(values, batch, strict=True)
        }

    def _microbatch(self, first: int, passes: Sequence[Runs]) -> list[float]:
        """Losses of its passes; the blocks before the switch have their gradients, those behind are updated."""
        import torch

        found = self.runners[0]()
        crossing = (found,) if isinstance(found, torch.Tensor) else found
        gradients, losses = [torch.zeros_like(x) for x in crossing], []
        for runs in passes:
            self.behind.stream.runs = runs
            own = _shifted(runs, -first)
            given = [_rows(x.detach(), dim, own).requires_grad_() for x, dim in zip(crossing, self.dims, strict=True)]
            loss = self.runners[1](*given)
            loss.backward()
            losses.append(float(loss))
            for x, dim, total in zip(given, self.dims, gradients, strict=True):
                if x.grad is not None:
                    total.index_add_(dim, _indices(own, x), x.grad / (len(passes) * self.count))
            self._update()
        torch.autograd.backward(crossing, gradients)
        return losses

    def _update(self) -> None:
        import torch

        with torch.no_grad():
            for name in self.changing:
                gradient, self.leaves[name].grad = self.leaves[name].grad, None
                if gradient is not None:
                    self.leaves[name].sub_(LEARNING_RATE * gradient)


def _shifted(runs: Runs, by: int) -> Runs:
    return tuple((first + by, count) for first, count in runs)


def _indices(runs: Runs, x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor([first + i for first, count in runs for i in range(count)], device=x.device)


def _rows(x: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    return x.index_select(dim, _indices(runs, x))


def compare_updates(
    executor: Executor, serial: SerialPasses, state: Mapping[str, torch.Tensor], loss: float
) -> Agreement:
    """Compare after `compute_gradients`: gradients before the switch, changes of the parameters behind it.

    Args:
        state: whole parameters from which both steps began.
        loss: what `compute_gradients` returned.
    """
    from autopar.runtime.compare import agreement

    def found(name: str) -> torch.Tensor | None:
        if name in serial.changes:
            return executor.store.whole_parameter(name) - state[name]
        return executor.store.whole_gradient(name)

    return agreement(executor, found, {**serial.gradients, **serial.changes}, loss, serial.loss)
