"""The energy study: its programs do the same work however it is shared out, and its predictions are studies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).resolve().parent.parent / "examples" / "energy_study.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("energy_study", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["energy_study"] = module
    spec.loader.exec_module(module)
    return module


def gradient(example: ModuleType, name: str, worker: int, num_workers: int) -> tuple[torch.Tensor, float]:
    task = example.TASKS[name](worker, num_workers)
    for parameter in task.parameters:
        parameter.grad = torch.zeros_like(parameter)
    loss = task.gradient(3)
    return torch.cat([parameter.grad.reshape(-1) for parameter in task.parameters]), loss


@pytest.mark.parametrize("name", ["logistic regression", "evolutionary search", "network by SGD"])
def test_the_mean_over_workers_is_the_serial_gradient(example: ModuleType, name: str) -> None:
    whole, loss = gradient(example, name, 0, 1)
    parts = [gradient(example, name, worker, 4) for worker in range(4)]
    torch.testing.assert_close(torch.stack([g for g, _ in parts]).mean(dim=0), whole, rtol=1e-4, atol=1e-5)
    assert sum(value for _, value in parts) / 4 == pytest.approx(loss, rel=1e-5)


def test_the_search_estimates_the_gradient(example: ModuleType) -> None:
    found, _ = gradient(example, "evolutionary search", 0, 1)
    search = example.Evolution(0, 1)
    weight, bias = (parameter.requires_grad_() for parameter in search.parameters)
    loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(search.x, weight, bias), search.labels)
    exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, (weight, bias))])
    assert float(torch.nn.functional.cosine_similarity(found, exact, dim=0)) > 0.1  # 64 samples of 1290 directions


@pytest.mark.slow
@pytest.mark.dist
def test_the_study_runs_and_says_where_energy_is_least(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PATH.parent))  # as when it is run as a script
    studies = example.run_study((1, 2), 3, "none", say=lambda _phrase: None)
    assert [study.title.partition(" on ")[0] for study in studies] == list(example.TASKS)
    for study in studies:
        assert all(case.run is not None and case.price is not None for case in study.cases)
        assert {case.run_energy.label for case in study.cases} <= {"measured", "modelled"}
    text = example.summary(studies)
    assert text.count("predicted") == text.count("run here") == 3
