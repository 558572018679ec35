"""Built-in model families: `gpt` and `llama`, whose published configurations are sizes alone.

`gpt` is the decoder of GPT-2, GPT-3, Megatron-LM and MPT: layer norms before attention and before a GELU MLP of two
matrices (Radford et al. 2019; Shoeybi et al. 2019; MPT: alibi in place of learned positions, no biases). `llama` is
that of Touvron et al. 2023: RMS norms, rotary positions, a gated MLP of three matrices, grouped keys and values.

The batch is `tokens` and `labels` (the tokens that follow), both [batch, seq]; for inference `tokens` alone, and with
`cache` one token per sequence and the keys and values of those before it (see `capture.generate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from autopar.capture.decoder import Decoder
from autopar.capture.generate import DecodeStep, Prefill, inference_batch
from autopar.capture.model_source import ModelSource, convert_option
from autopar.errors import InputError
from autopar.ir.families import CHOICES, FAMILIES, LlamaOptions, Options


def load_family(name: str, options: Mapping[str, str], *, is_inference: bool = False) -> ModelSource:
    """Source of a family with `--set` options given as text.

    Raises:
        InputError: an unknown option, or a value that is none or does not fit the others; names the option.
    """
    chosen = _parse(name, options)
    if is_inference:
        kind = DecodeStep if chosen.cache else Prefill
        return ModelSource(name, name, lambda: kind(chosen), lambda: inference_batch(chosen), options=dict(options))
    if chosen.cache:
        raise InputError(f"{name}: option cache={chosen.cache}: decoding is for --mode inference")
    return ModelSource(name, name, lambda: Decoder(chosen), lambda: _batch(chosen), options=dict(options))


def _parse(name: str, options: Mapping[str, str]) -> Options:
    kind = FAMILIES[name]
    defaults = {field.name: field.default for field in fields(kind)}
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise InputError(f"{name}: unknown option {', '.join(unknown)}; options of {name}: {', '.join(defaults)}")
    given = {key: convert_option(name, key, value, defaults[key]) for key, value in sorted(options.items())}
    for key, value in given.items():
        if key in CHOICES and value not in CHOICES[key]:
            raise InputError(f"{name}: option {key}={value}: expected one of {', '.join(CHOICES[key])}")
        if type(value) is int and value < 1:
            raise InputError(f"{name}: option {key}={value}: must be at least 1")
        if key == "dropout" and not 0 <= value < 1:
            raise InputError(f"{name}: option dropout={value}: must be at least 0 and below 1")
    chosen = kind(**given)
    if chosen.hidden % chosen.heads:
        raise InputError(f"{name}: option heads={chosen.heads}: does not divide hidden={chosen.hidden}")
    if chosen.kv_heads and chosen.heads % chosen.kv_heads:
        raise InputError(f"{name}: option kv_heads={chosen.kv_heads}: does not divide heads={chosen.heads}")
    if isinstance(chosen, LlamaOptions) and chosen.hidden // chosen.heads % 2:
        raise InputError(f"{name}: option heads={chosen.heads}: rotary positions need heads of an even width")
    if chosen.cache >= chosen.seq and chosen.positions == "learned":
        raise InputError(f"{name}: option cache={chosen.cache}: there are learned positions for seq={chosen.seq} alone")
    return chosen


def _batch(options: Options) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocab, (options.batch, options.seq), generator=generator)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1)}
