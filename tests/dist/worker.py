"""What the processes of the distributed tests do: run decisions and report how far they are from the serial step."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh, stage_mesh
from autopar.ir.solution import RECOMPUTE, Decisions
from autopar.planner.assemble import make_executor, make_serial_executor
from autopar.program.flat import Gather
from autopar.program.gathered import Frame
from autopar.runtime.compare import compare, relative_error
from autopar.runtime.executor import OptimizerOptions, RunOptions, join_plan
from autopar.runtime.mesh import RankMesh
from tests.dist.decisions import (
    cut_evenly,
    data_parallel,
    expert_parallel,
    random_decisions,
    sequence_parallel,
    tensor_parallel,
)
from tests.dist.models import BATCH, as_double, captured, global_batch
from tests.dist.rule_graph import decisions_with, rule_graph, strategies_on
from tests.rules_cases import CASES, COLLECTIVE_CASES


class Bench:
    """One model at one microbatch size, with its serial step."""

    def __init__(self, name: str, num_microbatches: int) -> None:
        found = captured(name, BATCH // num_microbatches)
        self.graph: OpGraph = found.graph
        outside = [v.name for v in self.graph.values.values() if v.origin in ("parameter", "buffer", "constant")]
        self.state = {v: as_double(found.tensor(v).detach().clone()) for v in outside}
        self.batch = global_batch(name)
        self.serial = make_serial_executor(self.graph, self.state, num_microbatches=num_microbatches)
        self.serial_loss = self.serial.compute_gradients(self.batch)

    def error_of(self, decisions: Decisions, options: RunOptions | None = None) -> float:
        """Largest relative error of loss, gradients and updated buffers."""
        mesh = mesh_of("", self.graph, decisions)
        executor = make_executor(self.graph, decisions, self.state, mesh, options)
        loss = executor.compute_gradients(self.batch)
        executor.sync_buffers()
        buffers = [relative_error(executor.buffers[n].double(), self.serial.buffers[n].double())
                   for n in executor.updated_buffers]  # fmt: skip
        boundary = [
            relative_error(whole_of(item.boundary), self.state[name]) for name, item in executor.store.items.items()
        ]
        return max(compare(executor, loss, self.serial, self.serial_loss).largest_error, *buffers, *boundary, 0.0)


@functools.lru_cache(maxsize=32)
def bench_of(name: str, num_microbatches: int) -> Bench:
    """The same for all cases of this process: they read it."""
    return Bench(name, num_microbatches)


def whole_of(parameter: Tensor) -> Tensor:
    """What the DTensor says that the whole parameter is: its placements must describe how it was sliced."""
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


_MESHES: dict[tuple[object, ...], RankMesh] = {}


def mesh_of(name: str, graph: OpGraph, decisions: Decisions) -> RankMesh:
    """Process groups are made once for equal meshes and cuts of one name."""
    key = (name or graph.name, decisions.mesh, decisions.stages, decisions.interleave, decisions.stage_meshes)
    if key not in _MESHES:
        _MESHES[key] = join_plan(graph, decisions, "cpu")
    return _MESHES[key]


def random_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """`count` random decisions per model; the same on every rank because the generator is."""
    results = []
    for name in arguments["models"]:
        for num_microbatches in arguments["microbatches"]:
            bench = bench_of(name, num_microbatches)
            for index in range(arguments["count"]):
                rng = random.Random(f"{arguments['seed']}/{name}/{num_microbatches}/{index}")
                mesh, num_stages = random_shape(rng, len(bench.graph.blocks))
                decisions = random_decisions(
                    bench.graph, mesh, rng, num_microbatches=num_microbatches, num_stages=num_stages
                )
                started = time.perf_counter()
                error = bench.error_of(decisions)
                case = f"{name} M={num_microbatches} #{index} mesh={mesh.sizes} stages={num_stages}"
                results.append({"case": case, "error": error, "wall_s": time.perf_counter() - started})
    return results


def random_shape(rng: random.Random, num_blocks: int) -> tuple[StageMesh, int]:
    """A mesh and a number of stages that use every rank."""
    world = dist.get_world_size()
    shapes = [(s, d) for s in range(1, world + 1) if world % s == 0 and s <= num_blocks
              for d in range(1, world // s + 1) if (world // s) % d == 0]  # fmt: skip
    stages, outer = rng.choice(shapes)
    return stage_mesh(outer, world // stages // outer), stages


def named_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The plans that everybody knows, for each model."""
    results = []
    for name in arguments["models"]:
        bench = bench_of(name, 4)
        for label, make in named_plans(dist.get_world_size()).items():
            results.append({"case": f"{name} {label}", "error": bench.error_of(make(bench.graph))})
    return results


def sequence_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Sequences split over all ranks, and over half of them beside the batch, with both ways to do attention."""
    results = []
    world = dist.get_world_size()
    meshes = [stage_mesh(1, world), *([stage_mesh(2, world // 2)] if world > 2 else [])]
    for name, mesh, label in itertools.product(arguments["models"], meshes, ("context", "dim1")):
        bench = bench_of(name, 2)
        decisions = sequence_parallel(bench.graph, mesh, label, 2)
        if mesh.sizes[0] > 1:
            decisions = replace(decisions, stages=cut_evenly(bench.graph, 1, "full"))
        results.append({"case": f"{name} {label} {mesh.sizes}", "error": bench.error_of(decisions)})
    return results


def expert_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Experts split over all ranks, and over each axis of two in each way."""
    results = []
    world = dist.get_world_size()
    bench = bench_of("mixtral", 2)
    meshes = [stage_mesh(world), *([stage_mesh(2, world // 2)] if world > 2 else [])]
    for mesh in meshes:
        for labels in itertools.product(("tokens", "experts", "exchange"), repeat=len(mesh.axes)):
            recompute = "full" if len(set(labels)) > 1 else "none"
            decisions = expert_parallel(bench.graph, mesh, labels, 2)
            decisions = replace(decisions, stages=cut_evenly(bench.graph, 1, recompute))
            case = f"mixtral {'/'.join(labels)} {mesh.sizes} recompute {recompute}"
            results.append({"case": case, "error": bench.error_of(decisions)})
    return results


def named_plans(world: int) -> dict[str, Callable[[OpGraph], Decisions]]:
    """Plans on `world` ranks by name, four microbatches each."""
    flat = stage_mesh(world, 1)

    def pipeline(graph: OpGraph, schedule: str, recompute: str = "none") -> Decisions:
        stages = max(k for k in range(1, world + 1) if world % k == 0 and k <= len(graph.blocks))
        base = data_parallel(graph, stage_mesh(world // stages, 1), "replicated", 4)
        return replace(base, schedule=schedule, stages=cut_evenly(graph, stages, recompute))

    plans: dict[str, Callable[[OpGraph], Decisions]] = {
        label: (lambda graph, label=label: data_parallel(graph, flat, label, 4))
        for label in ("replicated", "zero1", "zero2", "zero3")
    }
    plans["tensor"] = lambda graph: tensor_parallel(graph, stage_mesh(1, world), 4)
    plans["gpipe"] = lambda graph: pipeline(graph, "gpipe")
    plans["1f1b"] = lambda graph: pipeline(graph, "1f1b")
    plans["1f1b recompute"] = lambda graph: pipeline(graph, "1f1b", "full")
    return plans


def recompute_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Every policy in a pipeline, with gathered parameters, and under tensor parallelism."""
    results = []
    for name in arguments["models"]:
        bench = bench_of(name, 4)
        plans = named_plans(dist.get_world_size())
        for label, policy in itertools.product(("1f1b", "zero3", "tensor"), RECOMPUTE[1:]):
            decisions = recomputing(plans[label](bench.graph), policy)
            results.append({"case": f"{name} {label} {policy}", "error": bench.error_of(decisions)})
    return results


def interleaved_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Two chunks of the model, and more where it has the blocks, on each of two or of all pipeline ranks."""
    results = []
    world = dist.get_world_size()
    for name, num_ranks in itertools.product(arguments["models"], sorted({2, world})):
        for count, policy, label in (
            (num_ranks, "none", "replicated"),
            (2 * num_ranks, "selective", "zero1"),
            (8, "full", "zero3"),
        ):
            bench = bench_of(name, count)
            fitting = [v for v in (2, 3) if v * num_ranks <= len(bench.graph.blocks)]
            for chunks in fitting:
                base = data_parallel(bench.graph, stage_mesh(world // num_ranks, 1), label, count)
                stages = cut_evenly(bench.graph, num_ranks * chunks, policy)
                decisions = replace(base, schedule="1f1b", stages=stages, interleave=chunks)
                case = f"{name} {num_ranks} x {chunks} chunks M={count} {label} {policy}"
                results.append({"case": case, "error": bench.error_of(decisions)})
    return results


def overlap_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Gradients summed while backward runs, in small and large buckets."""
    results = []
    world = dist.get_world_size()
    for name in arguments["models"]:
        bench = bench_of(name, 4)
        plans = named_plans(world)
        if world == 4:
            plans["zero1 2 x 2"] = lambda graph: data_parallel(graph, stage_mesh(2, 2), "zero1", 4)
            plans["replicated 2 x 2"] = lambda graph: data_parallel(graph, stage_mesh(2, 2), "replicated", 4)
        for (label, make), size in itertools.product(plans.items(), (600.0, 1e9)):
            options = RunOptions(overlap_gradients=True, bucket_bytes=size)
            results.append({"case": f"{name} {label} {size}", "error": bench.error_of(make(bench.graph), options)})
    return results


def prefetch_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters gathered ahead, kept by notes, run again, or in a pipeline of chunks; beside sums that overlap."""
    results = []
    world = dist.get_world_size()
    options = RunOptions(prefetch_parameters=True, overlap_gradients=True)
    for name in arguments["models"]:
        bench = bench_of(name, 4)
        for policy in RECOMPUTE:
            decisions = recomputing(data_parallel(bench.graph, stage_mesh(world, 1), "zero3", 4), policy)
            results.append({"case": f"{name} {policy}", "error": bench.error_of(decisions, options)})
        if world == 4:
            base = data_parallel(bench.graph, stage_mesh(2, 1), "zero3", 4)
            for policy, chunks in itertools.product(("none", "full"), (1, 2)):
                stages = cut_evenly(bench.graph, 2 * chunks, policy)
                decisions = replace(base, schedule="1f1b", stages=stages, interleave=chunks)
                case = f"{name} {policy} pipeline of 2 x {chunks} chunks"
                results.append({"case": case, "error": bench.error_of(decisions, options)})
            decisions = data_parallel(bench.graph, stage_mesh(2, 2), "zero3", 4)
            results.append({"case": f"{name} 2 x 2", "error": bench.error_of(decisions, options)})
    return results


def prefetch_facts(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """For each setting: the gathers of a step, and how many were waited for right after they were started."""
    bench = bench_of("gpt2", 1)
    decisions = data_parallel(bench.graph, stage_mesh(dist.get_world_size(), 1), "zero3", 1)
    results = []
    for prefetch, policy in itertools.product((False, True), ("none", "full")):
        mesh = mesh_of("", bench.graph, decisions)
        chosen = recomputing(decisions, policy)
        executor = make_executor(bench.graph, chosen, bench.state, mesh, RunOptions(prefetch_parameters=prefetch))
        order: list[int] = []
        begin, wait, enter = Gather.__init__, Gather.finish, Frame.enter_backward

        def entered(self: Frame) -> None:
            enter(self)  # noqa: B023
            if self.previous is not None:
                order.append(0)  # noqa: B023 - the block's backward runs between what stands before and after

        def begun(self: Gather, *args: Any) -> None:
            order.append(id(self))  # noqa: B023 - called in this turn only
            begin(self, *args)  # noqa: B023
            kept.append(self)  # noqa: B023

        def waited(self: Gather) -> list[Tensor]:
            order.append(-id(self))  # noqa: B023
            return wait(self)  # noqa: B023

        kept: list[Gather] = []
        Gather.__init__, Gather.finish = begun, waited  # type: ignore[method-assign]
        Frame.enter_backward = entered  # type: ignore[method-assign]
        try:
            executor.compute_gradients(bench.batch)
        finally:
            Gather.__init__, Gather.finish = begin, wait  # type: ignore[method-assign]
            Frame.enter_backward = enter  # type: ignore[method-assign]
        at_once = sum(b == -a for a, b in itertools.pairwise(order) if a > 0)
        counts = [len(segment.gathered) for program in executor.programs for segment in program.segments]
        results.append({"setting": [prefetch, policy], "gathers": len(kept), "at_once": at_once})
        results[-1] |= {"parameters": sum(counts), "blocks": sum(count > 0 for count in counts)}
    return results


def bucket_facts(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """For each setting: sums over ranks in a step, how many of them start before backward is over, and the memory."""
    bench = bench_of("gpt2", 2)
    decisions = data_parallel(bench.graph, stage_mesh(dist.get_world_size(), 1), "replicated", 2)
    results = []
    for overlap, size in itertools.product((False, True), (1.0, 1e9)):
        options = RunOptions(overlap_gradients=overlap, bucket_bytes=size)
        mesh = mesh_of("", bench.graph, decisions)
        executor = make_executor(bench.graph, decisions, bench.state, mesh, options)
        started: list[str] = []
        finish, reduce = executor.store.sync_gradients, dist.all_reduce

        def counted(x: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            is_gradient = async_op and x.is_floating_point()  # a loss counts its tokens meanwhile
            started.extend(["sum"] * is_gradient)  # noqa: B023 - called in this turn only
            return reduce(x, *args, async_op=async_op, **kwargs)  # noqa: B023

        def finishing() -> None:
            started.append("end of backward")  # noqa: B023
            finish()  # noqa: B023

        executor.store.sync_gradients = finishing  # type: ignore[method-assign]
        dist.all_reduce = counted
        try:
            executor.compute_gradients(bench.batch)
        finally:
            dist.all_reduce = reduce
        early = started.index("end of backward")
        results.append({"overlap": overlap, "size": size, "early": early, "late": len(started) - 1 - early})
        results[-1]["parameters"] = len(executor.store.items)
    return results


def recomputing(decisions: Decisions, policy: str) -> Decisions:
    """The same with another policy on every stage."""
    return replace(decisions, stages=tuple(replace(stage, recompute=policy) for stage in decisions.stages))


def rule_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rule case under its strategies on one axis, or under random pairs of them on two."""
    world = dist.get_world_size()
    mesh = stage_mesh(world) if world == 2 else stage_mesh(2, world // 2)
    rng = random.Random(0)
    results = []
    for case in (*CASES, *COLLECTIVE_CASES):
        found = rule_graph(case)
        if found is None:
            continue
        graph, state = found
        serial = make_serial_executor(graph, state)
        serial_loss = serial.compute_gradients([])
        for strategy in strategies_on(graph, mesh, rng, arguments["count"]):
            decisions = decisions_with(graph, mesh, strategy)
            executor = make_executor(graph, decisions, state, mesh_of("rules", graph, decisions))
            error = compare(executor, executor.compute_gradients([]), serial, serial_loss).largest_error
            buffers = [relative_error(executor.buffers[n], serial.buffers[n]) for n in executor.updated_buffers]
            label = "/".join(axis.label for axis in strategy)
            results.append({"case": f"{case} {label}", "error": max(error, *buffers, 0.0)})
    return results


def training_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A few optimizer steps with clipping: the losses and, with SGD, the parameters, against the serial ones.

    AdamW divides by the size of the gradient, so where that is rounding noise the parameter is noise too.
    """
    results = []
    for name, kind in itertools.product(arguments["models"], ("sgd", "adamw")):
        optimizer = OptimizerOptions(kind, learning_rate=1e-2, max_norm=0.5)
        options = RunOptions(optimizer=optimizer, overlap_gradients=kind == "sgd", bucket_bytes=2000.0)
        bench = bench_of(name, 4)
        serial = make_serial_executor(bench.graph, bench.state, options, num_microbatches=4)
        expected = [serial.step(bench.batch) for _ in range(3)]
        for label, make in named_plans(dist.get_world_size()).items():
            decisions = make(bench.graph)
            executor = make_executor(bench.graph, decisions, bench.state, mesh_of("", bench.graph, decisions), options)
            losses = [executor.step(bench.batch) for _ in range(3)]
            errors = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
            for parameter in executor.store.items if kind == "sgd" else ():
                found = executor.store.whole_parameter(parameter)
                errors.append(relative_error(found, serial.store.whole_parameter(parameter)))
            results.append({"case": f"{name} {kind} {label}", "error": max(errors)})
    return results
