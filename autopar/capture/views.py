"""Writing a changed view back into the tensor that it is a view of."""

from __future__ import annotations

from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.calls import Traced, ValueRef

_aten = torch.ops.aten
RESHAPES = ("aten.view.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim",
            "aten.squeeze.default", "aten.flatten.using_ints", "aten.unflatten.int", "aten.contiguous.default",
            "aten.alias.default", "aten.expand.default", "aten._unsafe_view.default")  # fmt: skip


def write_back(
    view: Traced, new: ValueRef, shape: tuple[int, ...]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Call (target, args, kwargs) that gives the parent with the view's part replaced by `new`, or None.

    Args:
        view: the op that took the view; its first argument is the parent.
        shape: of the parent.
    """
    name = torch_adapter.target_name(view.target)
    whole, arguments = view.args[0], view.args[1:]
    if name == "aten.slice.Tensor":
        return _aten.slice_scatter.default, (whole, new, *arguments), view.kwargs
    if name == "aten.select.int":
        return _aten.select_scatter.default, (whole, new, *arguments), view.kwargs
    if name == "aten.diagonal.default":
        return _aten.diagonal_scatter.default, (whole, new, *arguments), view.kwargs
    if name in ("aten.transpose.int", "aten.t.default"):
        return view.target, (new, *arguments), {}
    if name == "aten.permute.default":
        order = [dim % len(shape) for dim in arguments[0]]
        return view.target, (new, tuple(order.index(dim) for dim in range(len(shape)))), {}
    if name in RESHAPES and (name != "aten.expand.default" or _same_size(view, shape)):
        return _aten.reshape.default, (new, shape), {}
    return None


def _same_size(view: Traced, shape: tuple[int, ...]) -> bool:
    sizes = view.args[1]
    return len(sizes) == len(shape) and all(size in (-1, have) for size, have in zip(sizes, shape, strict=True))
