"""Normal forms of captured graphs: what is rewritten, what must not be, and that nothing changes in value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.capture.export import capture
from autopar.capture.model_source import ModelSource
from autopar.capture.source import load_source
from autopar.ir.graph import Op, OpGraph
from tests.capture.interpreter import run_graph

ATTENTION = "aten.scaled_dot_product_attention.default"
SMALL = {"layers": "1", "hidden": "32", "heads": "4", "seq": "8", "vocab": "64", "batch": "2"}
LLAMA = {**SMALL, "kv_heads": "2", "ffn": "48"}


class Masked(nn.Module):
    """Attention under a mask that the positions and the batch give."""

    def __init__(self, mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        positions = torch.arange(length, device=x.device)
        mask = self.mask(positions[None, None, :], positions[None, :, None], x)
        heads = self.project(x).unsqueeze(1)
        return functional.scaled_dot_product_attention(heads, heads, heads, mask.unsqueeze(1)).mean()


MASKS = {
    "causal": (lambda columns, rows, x: columns <= rows, True),
    "turned": (lambda columns, rows, x: rows >= columns, True),
    "everything": (lambda columns, rows, x: columns >= 0 * rows, False),
    "strict": (lambda columns, rows, x: columns <= rows - 1, False),
    "window": (lambda columns, rows, x: (columns <= rows) & (columns > rows - 3), False),
    "padded": (lambda columns, rows, x: (columns <= rows) & (x[:, :, 0] < 100)[:, None, :], False),
}


def attention_of(graph: OpGraph) -> Op:
    (op,) = [op for op in graph.ops if op.target == ATTENTION]
    return op


@pytest.mark.parametrize("length", [8, 8192])
@pytest.mark.parametrize("name", MASKS)
def test_only_a_mask_that_is_causal_for_every_batch_becomes_is_causal(name: str, length: int) -> None:
    mask, is_causal = MASKS[name]
    source = ModelSource(name, name, lambda: Masked(mask), lambda: torch.randn(2, length, 8), None)
    op = attention_of(capture(source).graph)
    assert op.kwargs.get("is_causal", False) == is_causal
    assert len(op.inputs) == (3 if is_causal else 4)


@pytest.mark.parametrize("name", ["causal", "window", "padded"])
def test_the_value_stays(name: str) -> None:
    torch.manual_seed(0)
    source = ModelSource(name, name, lambda: Masked(MASKS[name][0]), lambda: torch.randn(2, 8, 8), None)
    captured = capture(source, device="cpu", dtype="float64")
    eager = captured.module.model(*captured.inputs)
    torch.testing.assert_close(run_graph(captured)[captured.graph.loss], eager, rtol=1e-12, atol=0)


def test_a_llama_has_grouped_causal_attention_and_makes_no_mask() -> None:
    graph = capture(load_source("examples/llama.py", {**LLAMA, "seq": "10", "heads": "16", "kv_heads": "8"})).graph
    op = attention_of(graph)
    assert op.kwargs["is_causal"]
    assert op.kwargs["enable_gqa"]
    assert [graph.values[name].meta.shape[1] for name in op.inputs] == [16, 8, 8]
    assert not any(value.meta.shape[-2:] == (10, 10) for value in graph.values.values())


def test_few_heads_stay_repeated_so_that_ranks_can_share_them() -> None:
    op = attention_of(capture(load_source("examples/llama.py", LLAMA)).graph)
    assert "enable_gqa" not in op.kwargs


def test_a_long_mask_takes_no_room() -> None:
    long = {**LLAMA, "seq": "131072", "batch": "1"}
    assert attention_of(capture(load_source("examples/llama.py", long)).graph).kwargs["is_causal"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_activation_merges_batch_and_sequence(name: str) -> None:
    graph = capture(load_source(f"examples/{name}.py", LLAMA if name == "llama" else SMALL)).graph
    merged = [
        value.name
        for value in (graph.values[name] for op in graph.ops for name in op.outputs)
        if value.meta.shape[:1] == (16,) and value.requires_grad and graph.values[value.root].origin != "parameter"
    ]
    assert not merged
    assert sum(op.target == "autopar.token_loss" for op in graph.ops) == 1
    assert not any(op.target == "aten.addmm.default" for op in graph.ops)


def test_flops_and_kept_bytes_do_not_depend_on_the_form() -> None:
    """Four products of 16 tokens: 32 to 96, 32 to 32, 32 to 128 and back."""
    graph = capture(load_source("examples/gpt2.py", SMALL)).graph
    products = [op for op in graph.ops if op.target == "aten.linear.default" and op.name.startswith("addmm")]
    assert [op.flops_forward for op in products] == [2 * 16 * 32 * n for n in (96, 32, 128, 128)]
    assert all(name in graph.values for op in graph.ops for name in (*op.saved, *op.inputs))
    assert all(value.root in graph.values for value in graph.values.values())
