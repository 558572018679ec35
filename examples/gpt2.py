"""GPT-2 (124M parameters) on 64 sequences of 1024 tokens.

Source: Radford et al. 2019; sizes of the Hugging Face config `gpt2`. Dropout is 0 by default, as in most training runs
of today.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def build_model(
    *, layers: int = 12, hidden: int = 768, heads: int = 12, seq: int = 1024, vocab: int = 50257, dropout: float = 0.0
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
    return GPT2LMHeadModel(config)


def example_batch(*, batch: int = 64, seq: int = 1024, vocab: int = 50257) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
