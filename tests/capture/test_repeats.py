"""A shortened trace gives the graph of the full one in every field, or is refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autopar.capture import markers
from autopar.capture.export import Captured, capture
from autopar.capture.model_source import ModelSource
from autopar.capture.repeats import find_repeats
from tests.capture.models import source
from tests.capture.repeated_toys import IN_FULL, LAYERS, SHORTENED, WIDTH, Build, Chain, Layer

DEEP = {"gpt2": "8", "llama": "8", "bert": "8", "vit": "8", "t5": "7", "mixtral": "7", "resnet": "8"}
"""Layers that make the middle ones of the tiny examples repeat."""


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of the layers that were not traced."""
    found: list[int] = []
    original = markers.skipped

    def spy(values: Any, site: int, results: str) -> Any:
        found.append(site)
        return original(values, site, results)

    monkeypatch.setattr(markers, "skipped", spy)
    return found


def toy_source(build: Build) -> ModelSource:
    def loss(output: torch.Tensor, _: object) -> torch.Tensor:
        return output.square().mean()

    def build_with_embedding() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), build(), torch.nn.Linear(WIDTH, WIDTH))

    return ModelSource("toy", "<toy>", build_with_embedding, lambda: torch.zeros(6, WIDTH), loss, __file__)


def assert_same(short: Captured, full: Captured) -> None:
    assert list(short.graph.values) == list(full.graph.values)
    for mine, other in zip(short.graph.ops, full.graph.ops, strict=True):
        assert mine == other
    assert short.graph == full.graph
    assert short.constants.keys() == full.constants.keys()
    assert [*short.module.state_dict()] == [*full.module.state_dict()]


@pytest.mark.parametrize("name", sorted(DEEP))
def test_examples_give_the_graph_of_the_full_trace(name: str, skipped: list[int]) -> None:
    deep = source(name, layers=DEEP[name])
    short = capture(deep)
    assert skipped
    assert short.notes == ()
    assert_same(short, capture(deep, every_layer=True))


@pytest.mark.parametrize("name", sorted(SHORTENED))
def test_composition_of_layers_is_traced_as_it_is(name: str, skipped: list[int]) -> None:
    toy = toy_source(SHORTENED[name])
    short = capture(toy)
    assert short.notes == ()
    assert len(skipped) >= 2
    assert_same(short, capture(toy, every_layer=True))


@pytest.mark.parametrize("name", sorted(IN_FULL))
def test_whatever_may_differ_is_traced_in_full(name: str) -> None:
    build, reason = IN_FULL[name]
    toy = toy_source(build)
    short = capture(toy)
    assert bool(short.notes) == bool(reason), short.notes
    for note in short.notes:
        assert re.search(reason, note), note
    assert_same(short, capture(toy, every_layer=True))


def test_the_module_is_as_it_was() -> None:
    captured = capture(toy_source(Chain))
    for name, layer in captured.module.named_modules():
        assert "forward" not in vars(layer), name
        assert type(layer._parameters) is dict
    layers = captured.module.get_submodule("model.1.layers")
    assert [layer.index for layer in layers] == list(range(LAYERS))
    assert {type(layer) for layer in layers} == {Layer}


def test_numbers_are_told_from_constants() -> None:
    (repeat,) = find_repeats(Chain())
    assert repeat.paths == tuple(f"layers.{i}" for i in range(LAYERS))
    assert repeat.numbers == (("", "index"),)
    assert find_repeats(Chain(), min_alike=LAYERS + 1) == ()


def test_an_error_of_the_model_is_reported_as_ever() -> None:
    class Broken(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(Exception, match="depends on the values of a tensor"):
        capture(toy_source(lambda: Chain(Broken)))
