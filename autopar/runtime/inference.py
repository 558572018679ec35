"""InferenceExecutor: forward passes of a plan on one rank.

A pass runs M microbatches through this rank's stage. Each stage receives the values of the next microbatch while it
computes, and sends without waiting. Outputs stay on the stage that makes them, in the placement in which they leave
(`rules.outputs`). Batch inputs come in that of the op that reads them: a cache is put in place once, each rank its
part, and passes read it there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.graph import OpGraph
from autopar.ir.placement import Sharding
from autopar.ir.solution import Decisions
from autopar.program.collectives import slice_dim
from autopar.program.stage import StageProgram, left_name
from autopar.runtime.executor import RunOptions
from autopar.runtime.measure import Measured, finish, measure_rounds
from autopar.runtime.mesh import RankMesh
from autopar.runtime.microbatches import split_batch
from autopar.runtime.pace import Pacer
from autopar.runtime.parameters import ParameterStore
from autopar.runtime.stage_runner import StageRunner
from autopar.torch_adapter import dtype_of

Arriving = tuple[Tensor, dist.Work]
"""A tensor on its way from or to another stage."""


@dataclass(frozen=True)
class Placed:
    """A batch as one rank reads it: of each microbatch its part of the inputs, by value name, on the device."""

    microbatches: tuple[Mapping[str, Tensor], ...]


class InferenceExecutor:
    """One rank of a run that goes forward alone."""

    def __init__(
        self,
        graph: OpGraph,
        decisions: Decisions,
        program: StageProgram,
        state: Mapping[str, Tensor],
        *,
        mesh: RankMesh,
        options: RunOptions,
    ) -> None:
        """Take the rank's parts of the state.

        Args:
            graph: captured for inference, at the microbatch size.
            decisions: of the plan.
            program: of this rank's stage, for these decisions, on the mesh's axes.
            state: whole parameters, buffers and constants by value name, equal on all ranks.
            mesh: from `join_plan` or `serial_mesh`.
            options: of the run; its device is that of the program.
        """
        self.graph, self.decisions, self.program = graph, decisions, program
        self.mesh, self.options = mesh, options
        self.device = torch.device(options.device)
        values = [value for value in graph.parameters if value.name in program.parameters]
        self.store = ParameterStore(values, decisions.parameters, state, mesh=mesh, tied={}, device=options.device)
        others = (*program.buffers, *program.constants)
        held = {name: state[name].detach().clone().to(self.device) for name in others} | self.store.leaves
        self._runner = StageRunner(program, held, prefetch=options.prefetch_parameters)
        self._pacer = Pacer(decisions.pace_s)

    def place(self, batch: Sequence[Tensor]) -> Placed:
        """Bring this rank's part of a batch to its device.

        Args:
            batch: the whole global batch, one tensor per batch input of the graph in graph order, on any device.

        Raises:
            InputError: if the batch does not fit the graph.
        """
        entering = self.program.entering
        parts = split_batch(self.graph.outside("input"), self.decisions.num_microbatches, batch)
        return Placed(
            tuple(
                {name: self.part_of(x, entering[name]).to(self.device) for name, x in part.items() if name in entering}
                for part in parts
            )
        )

    def part_of(self, whole: Tensor, sharding: Sharding) -> Tensor:
        """This rank's part of a value, in memory of its own."""
        part = whole
        for axis, placement in zip(self.mesh.axes, sharding, strict=True):
            if placement.is_shard:
                part = slice_dim(part, axis, placement.dim)
        return part.clone(memory_format=torch.contiguous_format)

    def forward(self, placed: Placed) -> list[dict[str, Tensor]]:
        """One pass: of each microbatch this rank's part of the outputs that its stage makes, by value name."""
        self._pacer.wait()
        self._runner.feed(placed.microbatches)
        with torch.inference_mode():
            found = [self._run(())[1] for _ in placed.microbatches] if self.mesh.pipeline is None else self._pipelined()
        self.program.stream.step += 1
        return found

    def _run(self, received: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the next microbatch sends on, and its outputs."""
        values = self._runner.run_blocks(received)
        sent = [values[tensor.name].contiguous() for tensor in self.program.sent]
        return sent, {name: values[left_name(name)] for name in self.program.leaving}

    def _pipelined(self) -> list[dict[str, Tensor]]:
        """Outputs of all microbatches; the first stage receives nothing, and the last sends nothing."""
        count, group = self.decisions.num_microbatches, self.mesh.pipeline
        found: list[dict[str, Tensor]] = []
        leaving: list[Arriving] = []
        arriving = self._receive()
        for microbatch in range(count):
            received, arriving = arriving, self._receive() if microbatch + 1 < count else []
            sent, outputs = self._run(_finished(received))
            found.append(outputs)
            # Memory must last until what lies there has been sent, and no longer.
            leaving = [(x, work) for x, work in leaving if not work.is_completed()]
            leaving += [(x, _started(dist.isend(x, group=group, group_dst=self.program.stage + 1))) for x in sent]
        _finished(leaving)
        return found

    def _receive(self) -> list[Arriving]:
        """Start to receive one microbatch's values from the stage before."""
        found = []
        for tensor in self.program.received:
            room = torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype), device=self.device)
            work = dist.irecv(room, group=self.mesh.pipeline, group_src=self.program.stage - 1)
            found.append((room, _started(work)))
        return found


def measure_passes(executor: InferenceExecutor, placed: Placed, num_passes: int) -> Measured:
    """Run `num_passes` >= 1 passes over one batch; every rank must call. Rank 0 prints a line per pass."""
    device = executor.options.device

    def one(index: int) -> float:
        started = time.perf_counter()
        executor.forward(placed)
        finish(device)
        seconds = time.perf_counter() - started
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"pass {index + 1}/{num_passes}: {seconds:.4g} s", flush=True)
        return seconds

    return measure_rounds(one, num_passes, device)


def _started(work: dist.Work | None) -> dist.Work:
    """A transfer in which this rank takes part."""
    if work is None:
        raise AssertionError("a rank of a pipeline is in its group")
    return work


def _finished(transfers: Sequence[Arriving]) -> list[Tensor]:
    """The tensors, once they are there."""
    for _, work in transfers:
        work.wait()
    return [tensor for tensor, _ in transfers]
