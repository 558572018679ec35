"""Decoder: the modules of the built-in families.

The model returns the mean cross entropy of the labels, from logits in float32. Every layer is the same, so capture
traces three of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.ir.families import GptOptions, Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INIT_STD = 0.02
ROTARY_BASE = 500000.0


class Trunk(nn.Module):
    """Embedding, layers, norm and output projection."""

    def __init__(self, options: Options, layer: Callable[[Options], nn.Module]) -> None:
        super().__init__()
        self.options = options
        vocab = math.ceil(options.vocab / options.pad_vocab_to) * options.pad_vocab_to
        self.embedding = nn.Embedding(vocab, options.hidden)
        self.positions = nn.Embedding(options.seq, options.hidden) if options.positions == "learned" else None
        self.drop = nn.Dropout(options.dropout) if options.dropout else None
        self.layers = nn.ModuleList(layer(options) for _ in range(options.layers))
        self.norm = _norm(options)
        self.head = nn.Linear(options.hidden, vocab, bias=False)
        for embedding in (self.embedding, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=INIT_STD)
        if options.tied:
            self.head.weight = self.embedding.weight
        self.to(DTYPES[options.dtype])

    def embed(self, tokens: Tensor, *span: int) -> Tensor:
        """[batch, length, hidden] of tokens at the positions of `torch.arange(*span)`."""
        hidden: Tensor = self.embedding(tokens)
        if self.positions is not None:
            hidden = hidden + self.positions(torch.arange(*span, device=tokens.device))
        return hidden if self.drop is None else self.drop(hidden)


class Decoder(Trunk):
    """The loss of a batch."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, Layer)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        options = self.options
        hidden = self.embed(tokens, options.seq)
        turn = rotation(options, hidden, options.seq) if options.positions == "rotary" else None
        bias = score_bias(options, hidden) if options.attention == "unfused" else None
        for layer in self.layers:
            hidden = layer(hidden, turn, bias)
        logits = self.head(self.norm(hidden)).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class LayerParts(nn.Module):
    """Attention and MLP, each with a norm before it."""

    def __init__(self, options: Options, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = _norm(options)
        self.attention = attention
        self.mlp_norm = _norm(options)
        self.mlp: nn.Module = Mlp(options) if isinstance(options, GptOptions) else GatedMlp(options)
        self.drop = nn.Dropout(options.dropout) if options.dropout else None

    def add_mlp(self, hidden: Tensor) -> Tensor:
        """Stream after the MLP."""
        return hidden + self.dropped(self.mlp(self.mlp_norm(hidden)))

    def dropped(self, part: Tensor) -> Tensor:
        """What is added to the stream."""
        result: Tensor = part if self.drop is None else self.drop(part)
        return result


class Layer(LayerParts):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, Attention(options))

    def forward(self, hidden: Tensor, turn: Rotation | None, bias: ScoreBias | None) -> Tensor:
        hidden = hidden + self.dropped(self.attention(self.attention_norm(hidden), turn, bias))
        return self.add_mlp(hidden)


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by position, [seq, head width]."""
ScoreBias = tuple[Tensor, Tensor | None]
"""Where scores are forbidden, [seq, seq], and what is added to them, [heads, 1, seq]."""


class AttentionParts(nn.Module):
    """Projections and cores of causal self-attention."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.heads, self.kv_heads = options.heads, options.kv_heads or options.heads
        self.width = options.hidden // options.heads
        self.is_flash, self.dropout = options.attention == "flash", options.dropout
        self.is_fused = options.qkv == "fused"
        rows, kv_rows = options.hidden, self.kv_heads * self.width
        if self.is_fused:
            self.qkv = nn.Linear(options.hidden, rows + 2 * kv_rows, bias=options.bias)
        else:
            self.q = nn.Linear(options.hidden, rows, bias=options.bias)
            self.k = nn.Linear(options.hidden, kv_rows, bias=options.bias)
            self.v = nn.Linear(options.hidden, kv_rows, bias=options.bias)
        self.out = nn.Linear(options.hidden, options.hidden, bias=options.bias)

    def heads_of(self, hidden: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, heads, length, width]."""
        query, key, value = (part.transpose(1, 2) for part in self._project(hidden))
        if turn is not None:
            query, key = _rotated(query, turn), _rotated(key, turn)
        return query, key, value

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: ScoreBias | None) -> Tensor:
        """Each row against all before it."""
        return self._flash(query, key, value) if bias is None else self._unfused(query, key, value, bias)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, seq, heads, width]; a head's group lies together in a fused projection."""
        if not self.is_fused:
            shape, kv_shape = (self.heads, self.width), (self.kv_heads, self.width)
            key, value = self.k(hidden).unflatten(2, kv_shape), self.v(hidden).unflatten(2, kv_shape)
            return self.q(hidden).unflatten(2, shape), key, value
        group = self.heads // self.kv_heads
        parts = self.qkv(hidden).unflatten(2, (self.kv_heads, group + 2, self.width))
        query, key, value = parts.split([group, 1, 1], dim=3)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout, enable_gqa=self.heads != self.kv_heads
        )

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor, bias: ScoreBias) -> Tensor:
        if self.heads != self.kv_heads:
            key, value = (self._repeated(part) for part in (key, value))
        forbidden, added = bias
        scores = torch.matmul(query, key.transpose(2, 3)) * self.width**-0.5
        if added is not None:
            scores = scores + added
        weights = scores.masked_fill(forbidden, torch.finfo(scores.dtype).min).softmax(-1)
        if self.dropout:
            weights = functional.dropout(weights, self.dropout, self.training)
        return torch.matmul(weights, value)

    def _repeated(self, heads: Tensor) -> Tensor:
        """Each head of keys or values once for every head of queries that reads it."""
        return heads.unsqueeze(2).expand(-1, -1, self.heads // self.kv_heads, -1, -1).flatten(1, 2)


class Attention(AttentionParts):
    """Causal self-attention [batch, seq, hidden] -> the same."""

    def forward(self, hidden: Tensor, turn: Rotation | None, bias: ScoreBias | None) -> Tensor:
        mixed = self.mixed(*self.heads_of(hidden, turn), bias)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    """GELU between two matrices."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.up = nn.Linear(options.hidden, options.ffn_size, bias=options.bias)
        self.down = nn.Linear(options.ffn_size, options.hidden, bias=options.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down(functional.gelu(self.up(hidden), approximate="tanh"))
        return result


class GatedMlp(nn.Module):
    """SwiGLU: one matrix gates the other."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.gate = nn.Linear(options.hidden, options.ffn_size, bias=options.bias)
        self.up = nn.Linear(options.hidden, options.ffn_size, bias=options.bias)
        self.down = nn.Linear(options.ffn_size, options.hidden, bias=options.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down(functional.silu(self.gate(hidden)) * self.up(hidden))
        return result


def _norm(options: Options) -> nn.Module:
    if isinstance(options, GptOptions):
        return nn.LayerNorm(options.hidden, bias=options.bias)
    return nn.RMSNorm(options.hidden, eps=1e-5)


def rotation(options: Options, like: Tensor, *span: int) -> Rotation:
    """Su et al. 2021, in the halves' form, at the positions of `torch.arange(*span)`."""
    width = options.hidden // options.heads
    steps = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
    angles = torch.arange(*span, device=like.device, dtype=torch.float32)[:, None] * ROTARY_BASE**-steps
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def _rotated(heads: Tensor, turn: Rotation) -> Tensor:
    """[batch, heads, seq, width], each row turned by the angles of its position."""
    cosine, sine = turn
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine


def score_bias(options: Options, like: Tensor) -> ScoreBias:
    """The causal mask, and alibi's slopes times positions (Press et al. 2021)."""
    forbidden = torch.ones(options.seq, options.seq, dtype=torch.bool, device=like.device).triu(1)
    if options.positions != "alibi":
        return forbidden, None
    return forbidden, alibi(options, like, options.seq)


def alibi(options: Options, like: Tensor, length: int) -> Tensor:
    """[heads, 1, length]: slopes times positions."""
    places = torch.arange(length, device=like.device, dtype=torch.float32)
    ranks = torch.arange(1, options.heads + 1, device=like.device, dtype=torch.float32)
    slopes = 2.0 ** (-8.0 * ranks / options.heads)
    return (slopes[:, None, None] * places).to(like.dtype)
