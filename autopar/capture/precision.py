"""Mixed precision: a model source whose model computes in 16 bits, whatever it was written in.

Parameters and buffers become bfloat16 and so do the floating tensors that the model is given; what it returns is cast
to float32, so that the loss is computed there. Batch norms keep parameters and statistics in float32. Casts in the
model's own code hold. The float32 copy that the optimizer updates is not the model's affair: see `runtime.parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from autopar import torch_adapter
from autopar.capture.model_source import ModelSource
from autopar.errors import InputError
from autopar.ir.software import PRECISION_OPTION, PRECISIONS


def without_precision(options: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """The options of the model itself, and the precision among them. Raises InputError for an unknown one."""
    own = {key: value for key, value in options.items() if key != PRECISION_OPTION}
    precision = options.get(PRECISION_OPTION)
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; one of {', '.join(PRECISIONS)}")
    return own, precision


def in_precision(source: ModelSource, precision: str) -> ModelSource:
    """The source with its model computing in this precision, one of `ir.software.PRECISIONS`."""
    dtype = getattr(torch, PRECISIONS[precision])
    options = {**source.options, PRECISION_OPTION: precision}
    return replace(source, builder=_Cast(source.build_model, dtype), options=options)


class _Cast:
    """Builds the model and casts it."""

    def __init__(self, build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> None:
        self._build, self._dtype = build, dtype

    def __call__(self) -> torch.nn.Module:
        model = self._build().to(self._dtype)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.float()
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(_leave)
        return model

    def _enter(self, _: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return torch_adapter.tree_map(lambda x: _cast(x, self._dtype), (args, kwargs))


def _leave(_: torch.nn.Module, __: Any, output: Any) -> Any:
    return torch_adapter.tree_map(lambda x: _cast(x, torch.float32), output)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
