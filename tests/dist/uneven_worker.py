"""Stages with meshes of their own, for the tests with processes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh, stage_mesh
from autopar.ir.solution import Decisions
from autopar.planner.assemble import make_executor, make_serial_executor
from autopar.rules.stage_meshes import joined
from autopar.runtime.checkpoint import Saver, load
from autopar.runtime.checkpoint_store import CheckpointStore
from autopar.runtime.compare import relative_error
from autopar.runtime.executor import OptimizerOptions, RunOptions
from tests.dist.checkpoint_worker import POSITION
from tests.dist.decisions import cut_evenly, data_parallel, tensor_parallel
from tests.dist.worker import Bench, mesh_of

COUNT = 4
"""Microbatches."""
SETTINGS = (("1f1b", "zero1", "none"), ("gpipe", "zero3", "full"), ("1f1b", "replicated", "selective"))


def plan_on(graph: OpGraph, mesh: StageMesh, label: str) -> Decisions:
    """Samples split on the first axis or, if it has one rank, layers on the second."""
    if mesh.sizes[1] > 1:
        return tensor_parallel(graph, mesh, COUNT)
    return data_parallel(graph, mesh, label, COUNT)


def uneven(graph: OpGraph, shapes: Sequence[Sequence[int]], setting: tuple[str, str, str]) -> Decisions:
    """A pipeline of stages of those (dp, tp), the cuts as even as they go."""
    schedule, label, recompute = setting
    meshes = [stage_mesh(*shape) for shape in shapes]
    found = {mesh: plan_on(graph, mesh, label) for mesh in meshes}
    stages = cut_evenly(graph, len(meshes), recompute)
    return replace(joined(graph, [found[mesh] for mesh in meshes], stages), schedule=schedule)


def uneven_cases(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One step of each (model, meshes): loss, gradients, buffers, what DTensors say; and some with several steps."""
    results, settings = [], itertools.cycle(SETTINGS)
    benches: dict[str, Bench] = {}
    for name, shapes in arguments["cases"]:
        benches[name] = bench = benches.get(name) or Bench(name, COUNT)
        setting = next(settings)
        case = f"{name} {_words(shapes)} {' '.join(setting)}"
        results.append({"case": case, "error": bench.error_of(uneven(bench.graph, shapes, setting))})
    for name, shapes in arguments["training"]:
        results.append({"case": f"{name} {_words(shapes)} trained", "error": _training_error(benches, name, shapes)})
    for name, shapes in arguments["resumed"]:
        error = _resumed_error(benches, name, shapes, arguments["directory"])
        results.append({"case": f"{name} {_words(shapes)} resumed the other way round", "error": error})
    return results


def _words(shapes: Sequence[Sequence[int]]) -> str:
    return "/".join("x".join(map(str, shape)) for shape in shapes)


def _training_error(benches: dict[str, Bench], name: str, shapes: Sequence[Sequence[int]]) -> float:
    """Of the losses of three steps with clipping, and of the parameters after them."""
    options = RunOptions(optimizer=OptimizerOptions("sgd", learning_rate=1e-2, max_norm=0.5))
    bench = benches.get(name) or Bench(name, COUNT)
    serial = make_serial_executor(bench.graph, bench.state, options, num_microbatches=COUNT)
    decisions = uneven(bench.graph, shapes, SETTINGS[0])
    executor = make_executor(bench.graph, decisions, bench.state, mesh_of("", bench.graph, decisions), options)
    errors = []
    for _ in range(3):
        expected = serial.step(bench.batch)
        errors.append(abs(executor.step(bench.batch) - expected) / abs(expected))
    for parameter in executor.store.items:
        whole = serial.store.whole_parameter(parameter)
        errors.append(relative_error(executor.store.whole_parameter(parameter), whole))
    return max(errors)


def _resumed_error(benches: dict[str, Bench], name: str, shapes: Sequence[Sequence[int]], directory: str) -> float:
    """Of the losses of two clipped steps, and of two after a checkpoint that stages in the other order take up."""
    options = RunOptions(optimizer=OptimizerOptions("adamw", learning_rate=1e-2, max_norm=0.5))
    bench = benches.get(name) or Bench(name, COUNT)
    serial = make_serial_executor(bench.graph, bench.state, options, num_microbatches=COUNT)
    expected, found = [serial.step(bench.batch) for _ in range(4)], []
    store = CheckpointStore(Path(directory) / name)
    for turn, blank in ((shapes, False), (shapes[::-1], True)):
        decisions = uneven(bench.graph, turn, SETTINGS[1])
        state = {n: torch.zeros_like(x) if blank else x for n, x in bench.state.items()}
        executor = make_executor(bench.graph, decisions, state, mesh_of("", bench.graph, decisions), options)
        if blank:
            load(executor, store.path(POSITION.step))
        found += [executor.step(bench.batch) for _ in range(2)]
        if not blank:
            Saver(store, {}).save(executor, POSITION)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
