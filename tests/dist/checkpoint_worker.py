"""What the processes of the checkpoint tests do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autopar.ir.solution import Decisions
from autopar.planner.assemble import input_form, make_executor, make_serial_executor
from autopar.runtime.checkpoint import Saver, load, read_whole
from autopar.runtime.checkpoint_store import CheckpointStore, Position, read_manifest
from autopar.runtime.executor import Executor, OptimizerOptions, RunOptions
from tests.dist.decisions import random_decisions
from tests.dist.worker import Bench, bench_of, mesh_of, named_plans, random_shape

POSITION = Position(step=2, seed=0, data_seed=0, batch_size=8, optimizer="adamw", num_gpus=0, source="", graph_hash="")
OPTIONS = RunOptions(optimizer=OptimizerOptions("adamw", learning_rate=1e-2))


FEW = ("zero1", "tensor", "1f1b")
"""Plans that differ most in how they cut parameters and their optimizer states."""


def _plans(bench: Bench, count: int) -> dict[str, Decisions]:
    """Plans by name; without random ones, a few."""
    named = named_plans(dist.get_world_size())
    plans = {name: make(bench.graph) for name, make in named.items() if count or name in FEW}
    for index in range(count):
        rng = random.Random(f"checkpoint/{index}")
        mesh, num_stages = random_shape(rng, len(bench.graph.blocks))
        plans[f"random {index}"] = random_decisions(bench.graph, mesh, rng, num_microbatches=4, num_stages=num_stages)
    return plans


def _executor(bench: Bench, decisions: Decisions, *, is_fresh: bool = True) -> Executor:
    """With the model's weights, or with others, so that a tensor that is not loaded is seen."""
    state = bench.state if is_fresh else {name: torch.zeros_like(tensor) for name, tensor in bench.state.items()}
    return make_executor(bench.graph, decisions, state, mesh_of("", bench.graph, decisions), OPTIONS)


def contents(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    checkpoint = read_manifest(directory)
    return dict(read_whole(directory, checkpoint, sorted(checkpoint.tensors)))


def resume_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Two steps, a checkpoint, two more: the same plan resumed from it must repeat the last two, bit by bit."""
    results = []
    for model in arguments["models"]:
        bench = bench_of(model, 4)
        for label, decisions in _plans(bench, arguments["count"]).items():
            store = CheckpointStore(Path(arguments["directory"]) / f"{model}-{label}".replace("/", "-"))
            first = _executor(bench, decisions)
            for _ in range(2):
                first.step(bench.batch)
            saver = Saver(store, {}, is_async=arguments["is_async"])
            saver.save(first, POSITION)
            expected = [first.step(bench.batch) for _ in range(2)]
            saver.finish()
            resumed = _executor(bench, decisions, is_fresh=False)
            dist.barrier()
            position = load(resumed, store.path(2))
            found = [resumed.step(bench.batch) for _ in range(2)]
            same = all(torch.equal(a, resumed.store.leaves[n]) for n, a in first.store.leaves.items())
            results.append({
                "case": f"{model} {label}", "same": same and found == expected, "step": position.step,
                "num_tensors": len(read_manifest(store.path(2)).tensors), "losses": found,
            })  # fmt: skip
    return results


def reshard_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Load what another number of ranks wrote, save it again: every tensor must be what it was."""
    source = Path(arguments["source"])
    expected = contents(source)
    bench = bench_of(arguments["model"], 4)
    results = []
    for label, decisions in _plans(bench, arguments["count"]).items():
        store = CheckpointStore(Path(arguments["directory"]) / label.replace("/", "-"))
        executor = _executor(bench, decisions, is_fresh=False)
        load(executor, source)
        Saver(store, {}).save(executor, POSITION)
        dist.barrier()
        found = contents(store.path(2))
        same = found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
        rows = input_form(bench.graph, decisions, executor.mesh, bench.batch).rows
        results.append({
            "case": label, "same": same, "num_tensors": len(found), "rows": rows,
            "loss": executor.compute_gradients(bench.batch),
            "loss of its rows": executor.compute_gradients([_alone(tensor, rows) for tensor in bench.batch]),
        })  # fmt: skip
    return results


def few_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Both of the above in processes that are started once."""
    resumed = resume_cases({**arguments, "models": ["toy/transformer"], "is_async": True, "count": 0})
    return [*resumed, *reshard_cases({**arguments, "model": "toy/conv", "count": 0})]


def _alone(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The batch without the samples of other ranks."""
    index = torch.tensor(rows, dtype=torch.long)
    return torch.zeros_like(tensor).index_copy_(0, index, tensor[index])


def train_and_save(arguments: dict[str, Any]) -> list[float]:
    """A checkpoint of one process after two steps, and the losses of the two steps after it."""
    bench = bench_of(arguments["model"], 4)
    executor = make_serial_executor(bench.graph, bench.state, OPTIONS, num_microbatches=4)
    for _ in range(2):
        executor.step(bench.batch)
    Saver(CheckpointStore(Path(arguments["directory"])), {}).save(executor, POSITION)
    return [executor.step(bench.batch) for _ in range(2)]
