"""Inference of the built-in families: prefill of whole sequences, and one step of decoding against a cache.

Prefill takes `tokens` [batch, seq] and returns the logits that follow the last of them, [batch, vocab], and the cache:
keys and values of every layer, [batch, kv heads, seq, width] each.

A decode step takes one new token per sequence, [batch, 1], and such a cache of `cache` positions, and returns the
logits that follow, and the new keys and values alone, [batch, kv heads, 1, width]: appending them is up to whoever
holds the cache. The step reads all of the cache once and copies nothing of it. With attention that is not fused, alibi
counts as in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.capture.decoder import (
    DTYPES,
    AttentionParts,
    LayerParts,
    Rotation,
    ScoreBias,
    Trunk,
    alibi,
    rotation,
    score_bias,
)
from autopar.ir.families import Options

Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer."""


class CachingAttention(AttentionParts):
    """Attention that also returns its keys and values."""

    def forward(
        self, hidden: Tensor, turn: Rotation | None, bias: ScoreBias | Tensor | None, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        query, key, value = self.heads_of(hidden, turn)
        if past is None:
            assert not isinstance(bias, Tensor)
            mixed = self.mixed(query, key, value, bias)
        else:
            assert not isinstance(bias, tuple)
            mixed = self._against(query, (key, value), past, bias)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result, (key.contiguous(), value.contiguous())

    def _against(self, query: Tensor, new: Pair, past: Pair, bias: Tensor | None) -> Tensor:
        """One row of queries per sequence, [batch, heads, 1, width], against the cache and itself; of the same shape.

        Heads that share keys are rows of one product.
        """
        keys, values = past
        rows = self._grouped(query.squeeze(2), 1)
        old, own = (torch.matmul(rows, part.transpose(2, 3)) for part in (keys, new[0]))
        scores = torch.cat([old, own], dim=3) * self.width**-0.5
        if bias is not None:
            scores = scores + self._grouped(bias.squeeze(1), 0)
        weights = scores.softmax(3)
        length = keys.shape[2]
        mixed = torch.matmul(weights[..., :length], values) + torch.matmul(weights[..., length:], new[1])
        return mixed.flatten(1, 2).unsqueeze(2)

    def _grouped(self, heads: Any, dim: int) -> Tensor:
        """A dim of heads as two: those of keys, and the heads that share each."""
        grouped: Tensor = heads.unflatten(dim, (self.kv_heads, self.heads // self.kv_heads))
        return grouped


class CachingLayer(LayerParts):
    """A layer that also returns its keys and values."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, CachingAttention(options))

    def forward(
        self, hidden: Tensor, turn: Rotation | None, bias: ScoreBias | Tensor | None, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        part, pair = self.attention(self.attention_norm(hidden), turn, bias, past)
        return self.add_mlp(hidden + self.dropped(part)), pair


class Prefill(Trunk):
    """See the module docstring."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, CachingLayer)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Pair]]:
        options = self.options
        hidden = self.embed(tokens, options.seq)
        turn = rotation(options, hidden, options.seq) if options.positions == "rotary" else None
        bias = score_bias(options, hidden) if options.attention == "unfused" else None
        made = []
        for layer in self.layers:
            hidden, pair = layer(hidden, turn, bias, None)
            made.append(pair)
        return self.head(self.norm(hidden[:, -1])).float(), made


class DecodeStep(Trunk):
    """See the module docstring."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, CachingLayer)

    def forward(self, tokens: Tensor, cache: list[Pair]) -> tuple[Tensor, list[Pair]]:
        options, span = self.options, (self.options.cache, self.options.cache + 1)
        hidden = self.embed(tokens, *span)
        turn = rotation(options, hidden, *span) if options.positions == "rotary" else None
        has_alibi = options.attention == "unfused" and options.positions == "alibi"
        bias = alibi(options, hidden, options.cache + 1) if has_alibi else None
        made = []
        for layer, past in zip(self.layers, cache, strict=True):
            hidden, pair = layer(hidden, turn, bias, past)
            made.append(pair)
        return self.head(self.norm(hidden[:, -1])).float(), made


def inference_batch(options: Options) -> dict[str, object]:
    """`tokens`, and for decoding `cache`; made without a generator, so that the meta device makes none of it."""
    if not options.cache:
        return {"tokens": torch.randint(options.vocab, (options.batch, options.seq))}
    shape = (options.batch, options.kv_heads or options.heads, options.cache, options.hidden // options.heads)
    pairs = [tuple(torch.randn(shape, dtype=DTYPES[options.dtype]) for _ in range(2)) for _ in range(options.layers)]
    return {"tokens": torch.randint(options.vocab, (options.batch, 1)), "cache": pairs}
