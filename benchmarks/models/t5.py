"""T5 with heads of their own width, as the 3B checkpoint has them (d_kv 128): for `benchmarks/energy.py`.

Sizes: the public checkpoint (Raffel et al. 2020, section 3.7).
"""

import torch
from transformers import T5Config, T5ForConditionalGeneration


def build_model(
    *,
    layers: int = 24,
    hidden: int = 1024,
    heads: int = 32,
    head_width: int = 128,
    ffn: int = 16384,
    vocab: int = 32128,
    dropout: float = 0.1,
) -> torch.nn.Module:
    config = T5Config(
        num_layers=layers,
        num_decoder_layers=layers,
        d_model=hidden,
        num_heads=heads,
        d_kv=head_width,
        d_ff=ffn,
        vocab_size=vocab,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    return T5ForConditionalGeneration(config)


def example_batch(*, batch: int = 8, seq: int = 512, vocab: int = 32128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, vocab, (batch, seq), generator=generator)
    targets = torch.randint(2, vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": targets}
