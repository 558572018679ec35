"""Capture for inference: what the graph holds, and that prefill and decode steps of the families are the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autopar.capture.export import Captured, capture
from autopar.capture.families import load_family
from autopar.capture.generate import DecodeStep, Prefill
from autopar.capture.source import load_source
from autopar.errors import CaptureError, InputError
from autopar.ir.inference import MODE_OPTION, cache_bytes, tokens_per_sample
from autopar.ir.serialize_graph import dump_graph, graph_hash, parse_graph

TINY = {"layers": "3", "hidden": "32", "heads": "4", "vocab": "64", "seq": "12", "batch": "2", "dtype": "fp32"}
KINDS = {
    "gpt": {},
    "gpt with few heads of keys": {"kv_heads": "2", "qkv": "separate"},
    "gpt with alibi": {"attention": "unfused", "positions": "alibi", "kv_heads": "2"},
    "llama": {"kv_heads": "2"},
}


def captured(source: str, **options: str) -> Captured:
    return capture(load_source(source, {MODE_OPTION: "inference", **options}))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_decode_step_against_the_cache_of_a_prefill_continues_it(kind: str) -> None:
    family, options = kind.split(maxsplit=1)[0], {**TINY, **KINDS[kind]}
    torch.manual_seed(0)
    whole = load_family(family, options, is_inference=True).build_model().double().eval()
    assert isinstance(whole, Prefill)
    tokens = torch.randint(64, (2, 12))
    expected, made = whole(tokens)
    step = load_family(family, {**options, "cache": "11"}, is_inference=True).build_model().double().eval()
    assert isinstance(step, DecodeStep)
    step.load_state_dict(whole.state_dict())
    cache = [(keys[:, :, :11], values[:, :, :11]) for keys, values in made]
    found, new = step(tokens[:, 11:], cache)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    for (keys, values), (own_keys, own_values) in zip(made, new, strict=True):
        assert torch.allclose(own_keys, keys[:, :, 11:], rtol=1e-10, atol=1e-12)
        assert torch.allclose(own_values, values[:, :, 11:], rtol=1e-10, atol=1e-12)


def test_a_prefill_predicts_what_training_would() -> None:
    """The last logits of a prefill are those whose cross entropy the training model takes."""
    torch.manual_seed(0)
    model = load_family("llama", TINY, is_inference=True).build_model().double().eval()
    trained = load_family("llama", TINY).build_model().double()
    trained.load_state_dict(model.state_dict())
    tokens = torch.randint(64, (1, 12))
    labels = torch.full((1, 12), -100)
    labels[0, -1] = 7
    expected = torch.nn.functional.cross_entropy(model(tokens)[0].double(), torch.tensor([7]))
    assert trained(tokens, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_graph_for_inference_has_outputs_and_nothing_of_backward() -> None:
    graph = captured("llama", **TINY, kv_heads="2").graph
    assert graph.loss == ""
    assert graph.optimizer == "none"
    assert not any(value.requires_grad for value in graph.parameters)
    assert all(op.flops_backward == op.saved_extra_bytes == 0 for op in graph.ops)
    logits, *cache = graph.outputs
    assert (logits.key, logits.stays, logits.batch_dim) == ("0", False, 0)
    assert [o.key for o in cache] == [f"1.{layer}.{part}" for layer in range(3) for part in range(2)]
    assert all(output.stays for output in cache)
    held = [name for op in graph.ops for name in op.saved]
    assert sorted(held) == sorted({graph.values[name].root for name in graph.results} | {"tokens"})
    assert len({block.class_id for block in graph.blocks[1:3]}) == 1
    assert tokens_per_sample(graph) == 12
    assert cache_bytes(graph) == 0
    assert parse_graph(dump_graph(graph)) == graph


def test_a_cache_is_an_input_that_no_other_stage_reads() -> None:
    graph = captured("llama", **{**TINY, "kv_heads": "2", "seq": "64"}, cache="40").graph
    assert cache_bytes(graph) == 3 * 2 * 2 * 2 * 40 * 8 * 4
    assert tokens_per_sample(graph) == 1
    caches = {value.name for value in graph.outside("input") if value.meta.is_floating}
    readers = [op for op in graph.ops if caches & set(op.inputs)]
    assert len(caches) == len(readers) == 6
    assert not any(op.is_shared for op in readers)
    assert caches <= {name for op in readers for name in op.saved}


def test_a_shortened_trace_and_a_full_one_agree() -> None:
    source = load_source("gpt", {MODE_OPTION: "inference", **TINY, "layers": "5"})
    assert graph_hash(capture(source).graph) == graph_hash(capture(source, every_layer=True).graph)


def test_a_file_with_a_loss_is_run_without_it(tmp_path: Path) -> None:
    text = """
import torch
def build_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
def example_batch(batch: int = 6):
    return torch.ones(batch, 4), torch.zeros(batch, dtype=torch.long)
def loss(output, batch):
    return torch.nn.functional.cross_entropy(output, batch[1])
"""
    path = tmp_path / "model.py"
    path.write_text(text)
    graph = captured(str(path)).graph
    assert [op.target for op in graph.ops] == ["aten.linear.default", "aten.linear.default"]
    assert [(o.key, o.batch_dim) for o in graph.outputs] == [("", 0)]
    path.write_text(
        text.replace("return torch.nn.Sequential", "return Odd() if True else torch.nn.Sequential")
        + (
            "class Odd(torch.nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        self.w = torch.nn.Parameter(torch.ones(4))\n"
            "    def forward(self, x):\n        return torch.ones(3)\n"
        )
    )
    with pytest.raises(CaptureError, match="nothing that the model returns is computed from its parameters"):
        captured(str(path))


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="decoding is for --mode inference"):
        load_family("gpt", {**TINY, "cache": "4"})
    with pytest.raises(InputError, match="learned positions for seq=12 alone"):
        load_family("gpt", {**TINY, "cache": "12"}, is_inference=True)
