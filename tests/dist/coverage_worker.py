"""What the processes of `test_coverage` do: one setting of the runtime each, beside plain torch on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from autopar.planner.assemble import make_executor
from autopar.runtime.compare import relative_error
from autopar.runtime.executor import OptimizerOptions, RunOptions
from tests.dist.models import BATCH, as_double, captured
from tests.dist.worker import Bench, mesh_of, named_plans


def clip_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Norm and clipped gradients of every known plan against `torch.nn.utils.clip_grad_norm_` on the eager module."""
    results = []
    for name in arguments["models"]:
        bench, limit = Bench(name, 4), arguments["limit"]
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
