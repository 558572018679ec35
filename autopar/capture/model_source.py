"""ModelSource: how to make one model, its batch and its loss; what `load_source` gives and `capture` takes."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.user_code import user_errors
from autopar.errors import InputError

_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class ModelSource:
    """How to make one model and its batch.

    Attributes:
        name: short name, e.g. `gpt2`.
        text: as the user gave it.
        builder, batch_maker: without arguments, options already bound; may raise anything.
        loss: `loss(output, batch)` of the file, or None.
        user_file: absolute path of the user's file, for messages; None for Hugging Face configs.
        options: the options as given.
        dataset: of the file, if it has one: a dataset of samples, or a loader around it.
        make_batch: of the file, if it has one: the whole batch of a step, counted from 0.
        is_inference: the model is run forward alone, without its loss.
    """

    name: str
    text: str
    builder: Callable[[], torch.nn.Module]
    batch_maker: Callable[[], Any]
    loss: Loss | None = None
    user_file: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    dataset: Callable[[], Any] | None = None
    make_batch: Callable[[int], Any] | None = None
    is_inference: bool = False

    def build_model(self) -> torch.nn.Module:
        """Build on the current default device. Raises InputError if the code fails or builds no module."""
        with user_errors(f"{self.text}: building the model failed", self.user_file):
            model = self.builder()
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"{self.text}: build_model must return an nn.Module, not {type(model).__name__}")
        return model

    def raw_batch(self) -> Any:
        """The batch as the user's code makes it: tensor, tuple or dict. Raises InputError."""
        with user_errors(f"{self.text}: making the example batch failed", self.user_file):
            batch = self.batch_maker()
        if isinstance(batch, list):
            batch = tuple(batch)
        if not isinstance(batch, torch.Tensor | tuple | Mapping):
            raise InputError(
                f"{self.text}: example_batch must return a tensor, a tuple or a dict, not {type(batch).__name__}"
            )
        if not tensor_leaves(batch):
            raise InputError(f"{self.text}: example_batch holds no tensor")
        return dict(batch) if isinstance(batch, Mapping) else batch

    def example_batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The batch as positional and keyword arguments."""
        return as_arguments(self.raw_batch())

    @property
    def batch_size(self) -> int:
        """Leading dim of the first tensor of the batch."""
        with torch.device("meta"):
            return leading_dim(self.raw_batch(), self.text)


def tensor_leaves(batch: Any) -> list[torch.Tensor]:
    """All tensors of a nested batch, in pytree order."""
    return [leaf for leaf in torch_adapter.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def leading_dim(batch: Any, text: str) -> int:
    """Samples in the batch. Raises InputError if the first tensor has no dim or no sample."""
    first = tensor_leaves(batch)[0]
    if first.dim() == 0 or first.shape[0] == 0:
        raise InputError(f"{text}: the first tensor of example_batch has shape {tuple(first.shape)}: no samples")
    return int(first.shape[0])


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a tensor, tuple or dict."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch), {}


def accepted_parts(model: torch.nn.Module, batch: Any, *, optional: bool = False) -> tuple[str, ...]:
    """Parts of the batch that `model.forward` takes: dict keys, or as many names as positional parts.

    With `optional`, those alone that have a default.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    if optional:
        parameters = [p for p in parameters if p.default is not p.empty]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(batch, Mapping):
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters) and not optional
        return tuple(key for key in batch if takes_all or key in named)
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    count = 1 if isinstance(batch, torch.Tensor) else len(batch)
    return tuple(str(i) for i in range(count)) if takes_all else tuple(positional[:count])


def convert_option(text: str, name: str, value: str, default: object) -> Any:
    """`value` as the type of `default`; without a typed default, as the Python literal it looks like, else text."""
    try:
        if isinstance(default, bool):
            return _TRUTH[value.lower()]
        if isinstance(default, int | float):
            return type(default)(value)
    except (KeyError, ValueError):
        raise InputError(f"{text}: option {name}={value}: not a {type(default).__name__}") from None
    if isinstance(default, str):
        return value
    if value.lower() in ("true", "false"):
        return _TRUTH[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
