"""What the processes of `test_offload` do: the same plan with and without offload, step by step, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.capture.precision import in_precision
from autopar.ir.offload import Offload
from autopar.ir.solution import Decisions
from autopar.planner.assemble import make_executor
from autopar.planner.materialise import capture_for_run, sized_batch
from autopar.runtime.checkpoint import Saver, load
from autopar.runtime.checkpoint_store import CheckpointStore
from autopar.runtime.executor import Executor, OptimizerOptions, RunOptions
from tests.dist.checkpoint_worker import POSITION
from tests.dist.models import BATCH, source
from tests.dist.worker import bench_of, mesh_of, named_plans

OPTIONS = RunOptions(optimizer=OptimizerOptions("adamw", learning_rate=1e-2, max_norm=1.0), offload_least_bytes=1)
OFFLOADS = (Offload("host", "host"), Offload("disk", "disk"))


def _fit(decisions: Decisions, offload: Offload) -> Decisions:
    """The plan with what it may offload: under recompute the optimizer's states alone."""
    redoes = any(stage.recompute != "none" for stage in decisions.stages)
    return replace(decisions, offload=Offload(offload.optimizer) if redoes else offload)


def _steps(executor: Executor, batch: Any, count: int) -> list[float]:
    return [executor.step(batch) for _ in range(count)]


def _same_leaves(first: Executor, second: Executor) -> bool:
    return all(torch.equal(leaf, second.store.leaves[name]) for name, leaf in first.store.leaves.items())


def offload_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses and parameters of three steps of every known plan, with and without offload."""
    results = []
    for name in arguments["models"]:
        bench = bench_of(name, 4)
        for label, make in named_plans(dist.get_world_size()).items():
            plain = make(bench.graph)
            mesh = mesh_of("", bench.graph, plain)
            expected = make_executor(bench.graph, plain, bench.state, mesh, OPTIONS)
            losses = _steps(expected, bench.batch, 3)
            for offload in OFFLOADS:
                found = make_executor(bench.graph, _fit(plain, offload), bench.state, mesh, OPTIONS)
                same = _steps(found, bench.batch, 3) == losses and _same_leaves(expected, found)
                results.append({"case": f"{name} {label} {offload.words}", "same": same})
    return results


def master_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The same in bfloat16 with masters in float32, and how many bytes those take on the device between two steps."""
    torch.manual_seed(0)
    model = in_precision(source(arguments["model"]), "bf16")
    found = capture_for_run(model, batch_size=BATCH // 4, device="cpu")
    outside = [v.name for v in found.graph.values.values() if v.origin in ("parameter", "buffer", "constant")]
    state = {name: found.tensor(name).detach().clone() for name in outside}
    torch.manual_seed(1)
    batch, options = sized_batch(model, BATCH, "cpu"), replace(OPTIONS, master="float32")
    results = []
    for label in arguments["plans"]:
        plain = named_plans(dist.get_world_size())[label](found.graph)
        mesh = mesh_of(f"{arguments['model']} bf16", found.graph, plain)
        expected = make_executor(found.graph, plain, state, mesh, options)
        losses = _steps(expected, batch, 3)
        for offload in OFFLOADS:
            executor = make_executor(found.graph, _fit(plain, offload), state, mesh, options)
            same = _steps(executor, batch, 3) == losses and _same_leaves(expected, executor)
            items = executor.store.items.values()
            left = sum(i.updated.untyped_storage().nbytes() for i in items if i.updated.dtype != i.leaf.dtype)
            results.append({"case": f"bf16 {label} {offload.words}", "same": same, "left_bytes": left})
    return results


def checkpoint_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A checkpoint of an offloaded run goes on without offload, elsewhere, and where it was; bit by bit."""
    results = []
    bench = bench_of(arguments["model"], 4)
    for label in arguments["plans"]:
        plain = named_plans(dist.get_world_size())[label](bench.graph)
        mesh = mesh_of("", bench.graph, plain)
        first = make_executor(bench.graph, _fit(plain, OFFLOADS[1]), bench.state, mesh, OPTIONS)
        _steps(first, bench.batch, 2)
        store = CheckpointStore(Path(arguments["directory"]) / label)
        saver = Saver(store, {}, is_async=label == "zero1")
        saver.save(first, POSITION)
        losses = _steps(first, bench.batch, 2)
        saver.finish()
        dist.barrier()
        empty = {name: torch.zeros_like(tensor) for name, tensor in bench.state.items()}
        for offload in (Offload(), *OFFLOADS):
            resumed = make_executor(bench.graph, _fit(plain, offload), empty, mesh, OPTIONS)
            load(resumed, store.path(2))
            same = _steps(resumed, bench.batch, 2) == losses and _same_leaves(first, resumed)
            results.append({"case": f"{label} {offload.words or 'nothing'}", "same": same})
    return results
