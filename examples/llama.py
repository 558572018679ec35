"""Llama-3-8B in bfloat16 on 64 sequences of 4096 tokens.

Source: Grattafiori et al. 2024, table 3; sizes of the Hugging Face config `meta-llama/Meta-Llama-3-8B`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build_model(
    *,
    layers: int = 32,
    hidden: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    ffn: int = 14336,
    seq: int = 4096,
    vocab: int = 128256,
    dtype: str = "bfloat16",
) -> torch.nn.Module:
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
    return LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))


def example_batch(*, batch: int = 64, seq: int = 4096, vocab: int = 128256) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
