"""What ranks of `test_passes.py` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autopar.ir.serialize import parse_plan
from autopar.planner.assemble import make_executor
from autopar.planner.execute import make_reference, prepare, run_options, verify_worker
from autopar.runtime.compare import relative_error
from autopar.runtime.executor import Executor, OptimizerOptions, RunOptions, join_plan

RATE = 0.05


def verify_all(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`autopar verify` of each plan, in one set of processes."""
    common = {"dtype": "float64", "tolerance": 1e-10}
    return [verify_worker({"plan": text, **common}) for text in arguments["plans"]]


def by_hand(arguments: Mapping[str, Any]) -> list[dict[str, float]]:
    """Errors of the loss, and of every parameter after one step, against plain loops over an eager AlexNet."""
    found = []
    for text, passes in zip(arguments["plans"], arguments["rows"], strict=True):
        plan = parse_plan(text)
        reference = make_reference(plan, "float64", "cpu")
        options = RunOptions(optimizer=OptimizerOptions("sgd", RATE, 0.0))
        mesh = join_plan(reference.graph, plan.decisions, "cpu")
        executor = make_executor(
            reference.graph, plan.decisions, reference.state, mesh, options, behind=reference.behind
        )
        loss = executor.step(reference.batch)
        model = prepare(plan, "cpu").captured.module.double()
        wanted_loss = _step(model.model, reference.batch, passes, plan.decisions.num_microbatches)
        errors = {
            name: relative_error(executor.store.whole_parameter(name), value.detach())
            for name, value in _by_value_name(executor, dict(model.model.named_parameters()))
        }
        found.append({"loss": abs(loss - wanted_loss) / abs(wanted_loss), **errors})
    return found


def _by_value_name(executor: Executor, parameters: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameters[item.value.fqn]) for name, item in executor.store.items.items()]


def _step(
    model: torch.nn.Module, batch: tuple[torch.Tensor, ...], passes: list[list[int]], num_microbatches: int
) -> float:
    """Convolutions learn from all samples, the classifier from each of `passes` (rows of a microbatch) in turn."""
    images, labels = batch
    before = torch.optim.SGD(model.features.parameters(), RATE)
    behind = torch.optim.SGD(model.classifier.parameters(), RATE)
    losses = []
    for some_images, some_labels in zip(images.chunk(num_microbatches), labels.chunk(num_microbatches), strict=True):
        features = model.features(some_images).flatten(1)
        halt = features.detach().requires_grad_()
        for rows in passes:
            behind.zero_grad()
            loss = torch.nn.functional.cross_entropy(model.classifier(halt[rows]), some_labels[rows])
            loss.backward()
            losses.append(float(loss))
            behind.step()
        features.backward(halt.grad / (len(passes) * num_microbatches))
    before.step()
    return sum(losses) / len(losses)


def losses(arguments: Mapping[str, Any]) -> list[list[float]]:
    """Losses of some AdamW steps of each plan."""
    found = []
    for text in arguments["plans"]:
        plan = parse_plan(text)
        ready = prepare(plan, "cpu")
        mesh = join_plan(ready.captured.graph, plan.decisions, "cpu")
        options = run_options(plan, "cpu")
        executor = make_executor(ready.captured.graph, plan.decisions, ready.state, mesh, options, behind=ready.behind)
        found.append([executor.step(ready.batch) for _ in range(arguments["steps"])])
    return found
