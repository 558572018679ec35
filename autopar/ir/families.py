"""Sizes and switches of the built-in model families, by name of the family; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

CHOICES = {
    "dtype": ("bf16", "fp16", "fp32"),
    "attention": ("flash", "unfused"),
    "positions": ("learned", "alibi", "none"),
    "qkv": ("fused", "separate"),
}
FFN_MULTIPLE = 256


@dataclass(frozen=True)
class GptOptions:
    """Sizes and switches of `gpt`; 0 stands for what follows from the others.

    Attributes:
        kv_heads: heads of keys and values; 0: `heads`.
        ffn: width inside the MLP; 0: 4 * hidden.
        pad_vocab_to: the vocabulary is padded to a multiple of it.
        attention: `flash`: one kernel; `unfused`: scores in memory, as Megatron-LM before flash attention.
        qkv: one projection for queries, keys and values, or three.
        dropout: of embeddings, attention probabilities, attention output and MLP output.
        tied: the output projection is the embedding.
        positions: `learned`: an embedding of positions; `alibi`: a bias on the scores (under `flash` part of the
            kernel, and left out); `none`.
        cache: for inference: one new token per sequence is decoded against the keys and values of so many before it;
            0: the whole sequence.
    """

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 0
    ffn: int = 0
    vocab: int = 50257
    pad_vocab_to: int = 1
    seq: int = 1024
    batch: int = 8
    dtype: str = "bf16"
    attention: str = "flash"
    qkv: str = "fused"
    dropout: float = 0.0
    bias: bool = True
    tied: bool = True
    positions: str = "learned"
    cache: int = 0

    @property
    def ffn_size(self) -> int:
        return self.ffn or 4 * self.hidden


@dataclass(frozen=True)
class LlamaOptions:
    """Sizes and switches of `llama`, as of `GptOptions`; ffn 0: 8/3 * hidden, rounded up to a multiple of 256."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 0
    ffn: int = 0
    vocab: int = 32000
    pad_vocab_to: int = 1
    seq: int = 4096
    batch: int = 8
    dtype: str = "bf16"
    attention: str = "flash"
    qkv: str = "separate"
    bias: bool = False
    tied: bool = False
    cache: int = 0

    dropout = 0.0
    positions = "rotary"

    @property
    def ffn_size(self) -> int:
        return self.ffn or math.ceil(self.hidden * 8 / 3 / FFN_MULTIPLE) * FFN_MULTIPLE


Options = GptOptions | LlamaOptions
FAMILIES: Mapping[str, type[GptOptions] | type[LlamaOptions]] = {"gpt": GptOptions, "llama": LlamaOptions}
