"""A graph of one sample takes the ops and names of the whole batch, and computes what it computed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from autopar.capture.export import Captured, capture
from autopar.capture.model_source import ModelSource
from autopar.capture.single import COPY, EXPAND, as_for_several
from tests.capture.interpreter import run_graph


class Shifted(nn.Module):
    """Copies that one sample does not need (its rows lie together when the first is cut off), and one that it needs;
    a row of numbers that is expanded where there are more samples, as libraries do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = x[:, 1:].contiguous()
        turned = self.project(early).transpose(1, 2).contiguous()
        late = self.project(x)[:, :-1].contiguous()
        numbers = torch.arange(4, device=x.device)[None]
        if x.shape[0] > 1:
            numbers = numbers.expand(x.shape[0], -1)
        return (turned.transpose(1, 2) * late * numbers[:, None]).mean()


class Plain(nn.Module):
    """Something else."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).mean()


def captured(model: type[nn.Module], batch_size: int) -> Captured:
    source = ModelSource("toy", "toy", model, lambda: torch.randn(4, 3, 4), None)
    return capture(source, batch_size=batch_size, device="cpu")


def test_copies_that_one_sample_does_not_need_come_back_under_their_names() -> None:
    one = captured(Shifted, 1)
    found = as_for_several(one.graph, captured(Shifted, 2).graph)
    assert sum(op.target == COPY for op in one.graph.ops) == 1
    assert [op.name for op in found.ops] == [op.name for op in captured(Shifted, 4).graph.ops]
    assert sum(op.target == COPY for op in found.ops) == 3
    assert sum(op.target == EXPAND for op in found.ops) == 1 + sum(op.target == EXPAND for op in one.graph.ops)
    expected = run_graph(one)
    computed = run_graph(replace(one, graph=found))
    assert torch.equal(computed[found.loss], expected[one.graph.loss])
    assert {name: tuple(computed[name].shape) for name in found.values} == {
        name: value.meta.shape for name, value in found.values.items()
    }


def test_a_graph_that_differs_in_more_stays_as_it_is() -> None:
    one = captured(Shifted, 1).graph
    assert as_for_several(one, captured(Plain, 2).graph) is one
