"""GPT-2 (124M parameters) on 64 sequences of 1024 tokens.

Source: Radford et al. 2019; sizes of the Hugging Face config `gpt2`. Dropout is 0 by default, as in most training runs
of today. For inference `cache=N` decodes one token per sequence after N others; Hugging Face's cache is copied in every
step.
"""

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer


class DecodeStep(torch.nn.Module):
    """One new token per sequence against a cache of keys and values by layer; returns the logits, and what is new."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, cache: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[object, ...]:
        past = DynamicCache()
        past.layers = [DynamicLayer() for _ in cache]
        for layer, (keys, values) in zip(past.layers, cache, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        output = self.model(input_ids=input_ids, past_key_values=past, use_cache=True)
        return output.logits[:, -1], [
            (layer.keys[:, :, -1:].clone(), layer.values[:, :, -1:].clone()) for layer in past.layers
        ]


def build_model(
    *,
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
    seq: int = 1024,
    vocab: int = 50257,
    dropout: float = 0.0,
    cache: int = 0,
) -> torch.nn.Module:
    config = GPT2Config(
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        n_positions=seq,
        vocab_size=vocab,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=vocab - 1,
        eos_token_id=vocab - 1,
    )
    model = GPT2LMHeadModel(config)
    return DecodeStep(model) if cache else model


def example_batch(
    *, layers: int = 12, hidden: int = 768, heads: int = 12, batch: int = 64, seq: int = 1024, vocab: int = 50257,
    cache: int = 0,
) -> dict[str, object]:  # fmt: skip
    if cache:
        shape = (batch, heads, cache, hidden // heads)
        pairs = [tuple(torch.randn(shape) for _ in range(2)) for _ in range(layers)]
        return {"input_ids": torch.randint(vocab, (batch, 1)), "cache": pairs}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
