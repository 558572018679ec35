"""Mixtral 8x7B, a mixture of experts, in bfloat16 on 32 sequences of 2048 tokens.

Source: Jiang et al. 2024, table 1; sizes of the Hugging Face config `mistralai/Mixtral-8x7B-v0.1`.
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM


def build_model(
    *, layers: int = 32, hidden: int = 4096, heads: int = 32, kv_heads: int = 8, ffn: int = 14336, experts: int = 8,
    seq: int = 2048, vocab: int = 32000, dtype: str = "bfloat16",
) -> torch.nn.Module:  # fmt: skip
    config = MixtralConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=seq,
        vocab_size=vocab,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        use_cache=False,
        dtype=dtype,
    )
    return MixtralForCausalLM._from_config(config)


def example_batch(*, batch: int = 32, seq: int = 2048, vocab: int = 32000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
