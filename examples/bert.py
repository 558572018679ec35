"""BERT-base, masked language modelling on 64 sequences of 512 tokens.

Source: Devlin et al. 2019, BERT-base; sizes of the Hugging Face config `bert-base-uncased`.
"""

import torch
from transformers import BertConfig, BertForMaskedLM


def build_model(
    *, layers: int = 12, hidden: int = 768, heads: int = 12, seq: int = 512, vocab: int = 30522, dropout: float = 0.0
) -> torch.nn.Module:
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=seq,
        vocab_size=vocab,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForMaskedLM(config)


def example_batch(*, batch: int = 64, seq: int = 512, vocab: int = 30522) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (batch, seq), generator=generator)
    targets = torch.randint(vocab, (batch, seq), generator=generator)
    return {"input_ids": tokens, "labels": targets}
