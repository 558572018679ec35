"""Hugging Face configs: `hf:PATH` builds the model of a config.json, without weights and without network.

The class follows from `architectures` (`LlamaForCausalLM` -> `AutoModelForCausalLM`), the loss is the model output's
`.loss`, the batch is random tokens or images with labels. Options are `batch`, `seq` and any field of the config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopar.capture.model_source import ModelSource, convert_option
from autopar.capture.user_code import user_errors
from autopar.errors import InputError

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
"""Ending of the architecture's name -> class that builds it."""

DEFAULT_BATCH = 8
DEFAULT_SEQ = 1024
POSITION_FIELDS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class _Plan:
    """What to build: the config object, the auto class, batch sizes."""

    config: Any
    auto_class: str
    batch: int
    seq: int

    def build(self) -> torch.nn.Module:
        import transformers

        model = getattr(transformers, self.auto_class).from_config(self.config, trust_remote_code=False)
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{self.auto_class} built a {type(model).__name__}")
        return model

    def example(self) -> dict[str, torch.Tensor]:
        return _images(self) if self.auto_class == "AutoModelForImageClassification" else _tokens(self)


def load_hf_source(text: str, options: Mapping[str, str]) -> ModelSource:
    """Source for `hf:PATH`.

    Raises:
        InputError: no such file, not a config, an unknown architecture or option, transformers not installed.
    """
    path = Path(text.removeprefix("hf:")).expanduser()
    fields = _read(text, path)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError(f"{text}: no model_type: not a Hugging Face model config")
    auto_class = _auto_class(text, fields.get("architectures"))
    config = _config(text, model_type, fields)
    sizes = {"batch": DEFAULT_BATCH, "seq": _default_seq(config)}
    for name, value in sorted(options.items()):
        if name in sizes:
            sizes[name] = convert_option(text, name, value, sizes[name])
        elif name in config.to_dict():
            fields[name] = convert_option(text, name, value, getattr(config, name))
        else:
            known = ", ".join(sorted({*sizes, *config.to_dict()}))
            raise InputError(f"{text}: unknown option {name}; options: {known}")
    for name, size in sorted(sizes.items()):
        if size < 1:
            raise InputError(f"{text}: option {name}={size}: must be at least 1")
    config = _config(text, model_type, fields)
    plan = _Plan(config, auto_class, sizes["batch"], sizes["seq"])
    builders: tuple[Callable[[], torch.nn.Module], Callable[[], Any]] = (plan.build, plan.example)
    return ModelSource(model_type, text, *builders, options=dict(options))


def _read(text: str, path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{text}: no such file: {path}") from None
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{text}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{text}: not a JSON object")
    return fields


def _auto_class(text: str, architectures: object) -> str:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for ending, auto_class in AUTO_CLASSES.items():
        if isinstance(name, str) and name.endswith(ending):
            return auto_class
    known = ", ".join(f"*{ending}" for ending in AUTO_CLASSES)
    raise InputError(f"{text}: architectures is {architectures!r}; it must start with one of {known}")


def _config(text: str, model_type: str, fields: Mapping[str, Any]) -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise InputError(f"{text}: hf: sources need transformers: pip install transformers") from None
    if "auto_map" in fields:
        raise InputError(f"{text}: the model's code is not part of transformers (auto_map); remote code is never run")
    with user_errors(f"{text}: not a usable config of type {model_type}", None):
        config = transformers.AutoConfig.for_model(model_type, **fields)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    return config


def _default_seq(config: Any) -> int:
    limits = [getattr(config, name, None) for name in POSITION_FIELDS]
    return min([DEFAULT_SEQ, *(limit for limit in limits if isinstance(limit, int))])


def _tokens(plan: _Plan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = plan.config.get_text_config().vocab_size
    tokens = torch.randint(min(2, vocab - 1), vocab, (plan.batch, plan.seq), generator=generator)
    if plan.auto_class == "AutoModelForSequenceClassification":
        return {
            "input_ids": tokens,
            "labels": torch.randint(plan.config.num_labels, (plan.batch,), generator=generator),
        }
    if plan.auto_class == "AutoModelForTokenClassification":
        return {"input_ids": tokens, "labels": torch.randint(plan.config.num_labels, tokens.shape, generator=generator)}
    return {"input_ids": tokens, "labels": tokens}


def _images(plan: _Plan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = getattr(plan.config, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    channels = getattr(plan.config, "num_channels", 3)
    pixels = torch.randn(plan.batch, channels, height, width, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(plan.config.num_labels, (plan.batch,), generator=generator)}
