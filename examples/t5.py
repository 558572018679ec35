"""T5-base, sequence to sequence on 64 pairs of 512 input and 128 target tokens.

Source: Raffel et al. 2020, section 3.1; sizes of the Hugging Face config `t5-base`.
"""

import torch
from transformers import T5Config, T5ForConditionalGeneration


def build_model(
    *, layers: int = 12, hidden: int = 768, heads: int = 12, ffn: int = 3072, vocab: int = 32128, dropout: float = 0.0
) -> torch.nn.Module:
    config = T5Config(
        num_layers=layers,
        num_decoder_layers=layers,
        d_model=hidden,
        num_heads=heads,
        d_kv=hidden // heads,
        d_ff=ffn,
        vocab_size=vocab,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def example_batch(*, batch: int = 64, seq: int = 512, target: int = 128, vocab: int = 32128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, vocab, (batch, seq), generator=generator)
    targets = torch.randint(2, vocab, (batch, target), generator=generator)
    return {"input_ids": tokens, "labels": targets}
