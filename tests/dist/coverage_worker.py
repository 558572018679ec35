"""What the processes of `test_coverage` do: one setting of the runtime each, beside plain torch on one device."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from autopar.capture.model_source import ModelSource
from autopar.capture.precision import in_precision
from autopar.ir.graph import OpGraph
from autopar.planner.assemble import make_executor, make_serial_executor
from autopar.planner.materialise import capture_for_run, sized_batch
from autopar.runtime.compare import relative_error
from autopar.runtime.executor import Executor, OptimizerOptions, RunOptions
from tests.dist.models import BATCH, as_double, captured, source
from tests.dist.worker import Bench, bench_of, mesh_of, named_plans, whole_of


def clip_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Norm and clipped gradients of every known plan against `torch.nn.utils.clip_grad_norm_` on the eager module."""
    results = []
    for name in arguments["models"]:
        bench, limit = bench_of(name, 4), arguments["limit"]
        expected, norm = _clipped_by_torch(name, bench, limit)
        options = RunOptions(optimizer=OptimizerOptions(max_norm=limit))
        for label, make in named_plans(dist.get_world_size()).items():
            decisions = make(bench.graph)
            executor = make_executor(bench.graph, decisions, bench.state, mesh_of("", bench.graph, decisions), options)
            executor.compute_gradients(bench.batch)
            found = executor.clip_gradients()
            assert found is not None
            errors = [abs(found - norm) / norm]
            errors += [relative_error(executor.store.whole_gradient(n), expected[n]) for n in executor.store.items]
            results.append({"case": f"{name} {label} {limit}", "error": max(errors)})
    return results


def _clipped_by_torch(name: str, bench: Bench, limit: float) -> tuple[dict[str, torch.Tensor | None], float]:
    """Gradients of the whole batch by value name, and the norm that they had; for models without batch statistics."""
    found = captured(name, BATCH)
    module = found.module.double()
    loss = module(*[as_double(tensor) for tensor in bench.batch])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
    return {value.name: found.tensor(value.name).grad for value in bench.graph.parameters}, float(norm)


def precision_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Training in bfloat16 under known plans, with and without a copy in float32, beside serial training in float32.

    For each: the largest relative distance of a loss, and how far parameters end from those of float32, relative to how
    far those have moved.
    """
    results = []
    for name, rate in itertools.product(arguments["models"], arguments["rates"]):
        single = source(name)
        wide, narrow = _training(single), _training(in_precision(single, "bf16"))
        optimizer = OptimizerOptions(learning_rate=rate, weight_decay=0.0)
        reference = make_serial_executor(wide.graph, wide.state, RunOptions(optimizer=optimizer), 4)
        expected = [reference.step(wide.batch) for _ in range(arguments["steps"])]
        for label, master in itertools.product(arguments["plans"], ("", "float32")):
            options = RunOptions(optimizer=optimizer, master=master, overlap_gradients=True, bucket_bytes=4000.0)
            decisions = named_plans(dist.get_world_size())[label](narrow.graph)
            mesh = mesh_of(f"{name} bf16", narrow.graph, decisions)
            executor = make_executor(narrow.graph, decisions, narrow.state, mesh, options)
            losses = [executor.step(narrow.batch) for _ in range(arguments["steps"])]
            apart = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
            strayed = _strayed(executor, reference, wide.state)
            results.append({"case": [name, label, rate, master], "loss": apart, "strayed": strayed})
    return results


@dataclass(frozen=True)
class _Training:
    graph: OpGraph
    state: dict[str, torch.Tensor]
    batch: tuple[torch.Tensor, ...]


def _training(model: ModelSource) -> _Training:
    torch.manual_seed(0)
    found = capture_for_run(model, batch_size=BATCH // 4, device="cpu")
    outside = [v.name for v in found.graph.values.values() if v.origin in ("parameter", "buffer", "constant")]
    torch.manual_seed(1)
    state = {name: found.tensor(name).detach().clone() for name in outside}
    return _Training(found.graph, state, sized_batch(model, BATCH, "cpu"))


def _strayed(executor: Executor, reference: Executor, start: dict[str, torch.Tensor]) -> float:
    """Distance of the boundary parameters that this rank has from the reference's, over the way from the start."""
    apart = moved = 0.0
    by_fqn = {item.value.fqn: name for name, item in reference.store.items.items()}
    for item in executor.store.items.values():
        name = by_fqn[item.value.fqn]
        found, wanted = whole_of(item.boundary).double(), reference.store.whole_parameter(name).double()
        begun = start[name].to(torch.bfloat16).double()
        apart += float((found - begun - (wanted - start[name].double())).square().sum())
        moved += float((wanted - start[name].double()).square().sum())
    return math.sqrt(apart / moved)


def dropout_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss and gradients of a model that drops, under every known plan and number of microbatches, against one device
    with one microbatch.
    """
    results = []
    whole = bench_of("toy/dropout", 1)
    loss = whole.serial_loss
    expected = {value.fqn: whole.serial.store.whole_gradient(value.name) for value in whole.graph.parameters}
    for count in (1, 2, 4, 8):
        bench = bench_of("toy/dropout", count)
        for label in ("zero2", "zero3", "tensor", "1f1b recompute"):
            decisions = replace(named_plans(dist.get_world_size())[label](bench.graph), num_microbatches=count)
            executor = make_executor(bench.graph, decisions, bench.state, mesh_of("", bench.graph, decisions))
            found = executor.compute_gradients(bench.batch)
            errors = [abs(found - loss) / loss]
            for name, item in executor.store.items.items():
                errors.append(relative_error(executor.store.whole_gradient(name), expected[item.value.fqn]))
            results.append({"case": f"{label} M={count}", "error": max(errors)})
    return results


def compile_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Known plans whose stages are compiled against the serial step, which is not."""
    results = []
    for name in arguments["models"]:
        bench = bench_of(name, 4)
        options = RunOptions(compile=arguments["backend"], overlap_gradients=True, prefetch_parameters=True)
        for label in arguments["plans"]:
            decisions = named_plans(dist.get_world_size())[label](bench.graph)
            results.append({"case": f"{name} {label}", "error": bench.error_of(decisions, options)})
    return results
