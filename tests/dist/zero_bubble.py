"""Cases of the zero-bubble schedule, for the processes that `test_zero_bubble` starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from autopar.ir.graph import OpGraph
from autopar.ir.mesh import stage_mesh
from autopar.ir.solution import Decisions
from autopar.runtime.executor import RunOptions
from tests.dist.decisions import cut_evenly, data_parallel
from tests.dist.worker import Bench, named_plans


def in_stages(
    make: Callable[[OpGraph], Decisions], graph: OpGraph, num_ranks: int, *, recompute: str = "none", chunks: int = 1
) -> Decisions:
    """The plan's strategies on stages of a zero-bubble pipeline."""
    stages = cut_evenly(graph, num_ranks * chunks, recompute)
    return replace(make(graph), schedule="zero-bubble", stages=stages, interleave=chunks)


def pipeline_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Pipelines alone: `policies` of recompute, also with chunks."""
    results, world = [], dist.get_world_size()
    for name in arguments["models"]:
        choices = itertools.product(arguments["microbatches"], arguments["policies"], (1, 2))
        for count, policy, chunks in choices:
            bench = Bench(name, count)
            if chunks * world > len(bench.graph.blocks) or (chunks > 1 and count % world):
                continue
            mesh = stage_mesh(1, 1)
            decisions = in_stages(
                lambda graph, count=count, mesh=mesh: data_parallel(graph, mesh, "replicated", count),
                bench.graph, world, recompute=policy, chunks=chunks,
            )  # fmt: skip
            results.append({"case": f"{name} M={count} x {chunks} {policy}", "error": bench.error_of(decisions)})
    return results


def mixed_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Two stages of two ranks: data, ZeRO and tensor parallelism inside, with sums that overlap and gathers ahead."""
    results = []
    lean = RunOptions(overlap_gradients=True, prefetch_parameters=True, bucket_bytes=600.0)
    for name in arguments["models"]:
        bench = Bench(name, 4)
        plans: dict[str, Callable[[OpGraph], Decisions]] = {
            label: lambda graph, label=label: data_parallel(graph, stage_mesh(2, 1), label, 4)
            for label in ("replicated", "zero1", "zero2", "zero3")
        }
        plans["tensor"] = named_plans(2)["tensor"]
        for label, make in plans.items():
            for policy, options in (("none", RunOptions()), ("full", lean), ("selective", lean))[:: arguments["every"]]:
                decisions = in_stages(make, bench.graph, 2, recompute=policy)
                decisions = replace(decisions, num_microbatches=4)
                case = f"{name} {label} {policy}"
                results.append({"case": case, "error": bench.error_of(decisions, options)})
    return results


def four_rank_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Both of the above, small."""
    return pipeline_cases(arguments | {"microbatches": [4]}) + mixed_cases(arguments)
