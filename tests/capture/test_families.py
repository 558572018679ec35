"""Built-in families: published counts of parameters, the FLOPs of another implementation, and every bad option."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from autopar.capture.export import Captured, capture
from autopar.capture.model_source import ModelSource
from autopar.capture.source import load_source
from autopar.errors import InputError
from autopar.ir.families import FAMILIES
from autopar.ir.graph import OpGraph
from tests.capture import models

LLAMA_8B = {"layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8", "ffn": "14336", "vocab": "128256"}
PUBLISHED: dict[str, tuple[str, dict[str, str], float]] = {
    "GPT-3 (Brown et al. 2020)": (
        "gpt",
        {"layers": "96", "hidden": "12288", "heads": "96", "vocab": "50257", "pad_vocab_to": "1024", "seq": "2048"},
        174.6e9,
    ),
    "GPT-2 XL (Radford et al. 2019)": ("gpt", {"layers": "48", "hidden": "1600", "heads": "25"}, 1.558e9),
    "MPT-7B (MosaicML 2023)": (
        "gpt",
        {"layers": "32", "hidden": "4096", "heads": "32", "vocab": "50432", "bias": "false", "positions": "alibi"},
        6.65e9,
    ),
    "Llama-2-7B (Touvron et al. 2023)": ("llama", {}, 6.738e9),
    "Llama-3-8B (Grattafiori et al. 2024)": ("llama", LLAMA_8B, 8.03e9),
    "Llama-3-70B (Grattafiori et al. 2024)": (
        "llama",
        {**LLAMA_8B, "layers": "80", "hidden": "8192", "heads": "64", "ffn": "28672"},
        70.55e9,
    ),
}
TINY = {"layers": "6", "hidden": "32", "heads": "4", "vocab": "64", "seq": "16", "batch": "4", "dtype": "fp32"}


def captured(name: str, **options: str) -> Captured:
    return capture(load_source(name, {**TINY, **options}))


def flops_by_target(graph: OpGraph) -> Counter[str]:
    """Forward and backward FLOPs of all products."""
    found: Counter[str] = Counter()
    for op in graph.ops:
        if any(name in op.target for name in ("linear", "matmul", "attention")):
            found[op.target] += op.flops_forward + op.flops_backward
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name: str) -> None:
    family, options, published = PUBLISHED[name]
    with torch.device("meta"):
        model = load_source(family, options).build_model()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.01)


def test_llama_is_that_of_the_library() -> None:
    sizes = {"layers": "6", "hidden": "32", "heads": "4", "kv_heads": "2", "ffn": "64", "vocab": "64", "seq": "16"}
    theirs = capture(load_source(str(models.EXAMPLES / "llama.py"), {**sizes, "batch": "4", "dtype": "float32"})).graph
    ours = captured("llama", **sizes).graph
    assert sorted(p.meta.shape for p in ours.parameters) == sorted(p.meta.shape for p in theirs.parameters)
    assert flops_by_target(ours) == flops_by_target(theirs)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_only_three_layers_are_traced_and_the_graph_is_that_of_all(family: str) -> None:
    text = load_source(family, TINY)
    short, full = capture(text), capture(text, every_layer=True)
    assert short.graph == full.graph
    assert short.notes == ()
    counts = Counter(block.class_id for block in short.graph.blocks)
    assert counts.most_common(1)[0][1] >= 4


def test_a_large_model_with_a_large_batch_is_captured_without_its_memory() -> None:
    sizes = {"layers": "96", "hidden": "12288", "heads": "96", "vocab": "51200", "seq": "2048"}
    graph = capture(load_source("gpt", {**sizes, "attention": "unfused", "dropout": "0.1"}), batch_size=2048).graph
    assert len(graph.blocks) == 98
    scores = max(value.meta.numel for value in graph.values.values())
    assert scores == 2048 * 96 * 2048 * 2048


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("gpt", {}), ("gpt", {"attention": "unfused"})),
        (("gpt", {"kv_heads": "2"}), ("gpt", {"kv_heads": "2", "attention": "unfused"})),
        (("llama", {"kv_heads": "2"}), ("llama", {"kv_heads": "2", "attention": "unfused"})),
    ],
)
def test_unfused_attention_computes_the_same(
    first: tuple[str, dict[str, str]], second: tuple[str, dict[str, str]]
) -> None:
    losses = []
    for family, options in (first, second):
        torch.manual_seed(0)
        source = load_source(family, {**TINY, **options})
        losses.append(source.build_model()(**source.example_batch()[1]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(torch.log(torch.tensor(64.0)).item(), rel=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_position_sees_later_tokens(family: str) -> None:
    torch.manual_seed(0)
    source = load_source(family, TINY)
    model, (_, batch) = source.build_model(), source.example_batch()
    seen: list[torch.Tensor] = []
    model.get_submodule("norm").register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    changed = batch["tokens"].clone()
    changed[:, 10] = (changed[:, 10] + 1) % 64
    model(**batch)
    model(tokens=changed, labels=batch["labels"])
    same = (seen[0] == seen[1]).all(dim=2).all(dim=0)
    assert same.tolist() == [True] * 10 + [False] * 6


def test_alibi_is_a_bias_on_unfused_scores_and_part_of_the_flash_kernel() -> None:
    plain, biased = (captured("gpt", attention="unfused", positions=p).graph for p in ("none", "alibi"))
    assert len([op for op in biased.ops if not op.is_shared]) == len([o for o in plain.ops if not o.is_shared]) + 6
    assert captured("gpt", positions="alibi").graph.ops == captured("gpt", positions="none").graph.ops


def test_padding_ties_and_biases() -> None:
    def shapes(**options: str) -> list[tuple[int, ...]]:
        return [p.meta.shape for p in captured("gpt", **options).graph.parameters]

    assert shapes(vocab="61", pad_vocab_to="8")[0] == (64, 32)
    assert shapes().count((64, 32)) == 1
    assert shapes(tied="false").count((64, 32)) == 2
    assert all(len(shape) == 2 or shape == (32,) for shape in shapes(bias="false"))


def test_families_go_before_files_of_their_name(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    with open("gpt", "w", encoding="utf-8") as file:
        file.write("raise ValueError\n")
    assert isinstance(load_source("gpt"), ModelSource)
    with pytest.raises(InputError, match="raises at import"):
        load_source("./gpt")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gtp", {}, "gtp: no such file, and no built-in model; those are gpt, llama"),
        ("gpt", {"layer": "2"}, "gpt: unknown option layer; options of gpt: layers, hidden, heads,"),
        ("llama", {"dropout": "0.1"}, "llama: unknown option dropout"),
        ("gpt", {"layers": "0"}, "gpt: option layers=0: must be at least 1"),
        ("gpt", {"kv_heads": "0"}, "gpt: option kv_heads=0: must be at least 1"),
        ("gpt", {"seq": "many"}, "gpt: option seq=many: not a int"),
        ("gpt", {"heads": "7"}, "gpt: option heads=7: does not divide hidden=768"),
        ("llama", {"kv_heads": "5"}, "llama: option kv_heads=5: does not divide heads=32"),
        ("llama", {"heads": "4096"}, "llama: option heads=4096: rotary positions need heads of an even width"),
        ("gpt", {"dtype": "float32"}, "gpt: option dtype=float32: expected one of bf16, fp16, fp32"),
        ("gpt", {"attention": "flush"}, "gpt: option attention=flush: expected one of flash, unfused"),
        ("gpt", {"dropout": "1"}, "gpt: option dropout=1.0: must be at least 0 and below 1"),
        ("gpt", {"tied": "perhaps"}, "gpt: option tied=perhaps: not a bool"),
    ],
)
def test_bad_options_are_named(family: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_source(family, options)
