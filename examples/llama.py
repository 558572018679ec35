"""Llama-3-8B in bfloat16 on 64 sequences of 4096 tokens.

For inference `cache=N` decodes one token per sequence after N others. Hugging Face's cache is copied in every step.

Source: Grattafiori et al. 2024, table 3; sizes of the Hugging Face config `meta-llama/Meta-Llama-3-8B`.
"""

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
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
    *, layers: int = 32, hidden: int = 4096, heads: int = 32, kv_heads: int = 8, ffn: int = 14336, seq: int = 4096,
    vocab: int = 128256, dtype: str = "bfloat16", cache: int = 0,
) -> torch.nn.Module:  # fmt: skip
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=seq,
        vocab_size=vocab,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        use_cache=False,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return DecodeStep(model) if cache else model


def example_batch(
    *, layers: int = 32, hidden: int = 4096, heads: int = 32, kv_heads: int = 8, batch: int = 64, seq: int = 4096,
    vocab: int = 128256, dtype: str = "bfloat16", cache: int = 0,
) -> dict[str, object]:  # fmt: skip
    if cache:
        shape = (batch, kv_heads, cache, hidden // heads)
        pairs = [tuple(torch.randn(shape, dtype=getattr(torch, dtype)) for _ in range(2)) for _ in range(layers)]
        return {"input_ids": torch.randint(vocab, (batch, 1)), "cache": pairs}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
