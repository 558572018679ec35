"""From the calls of the IR to torch calls: targets, references and encoded constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from autopar import torch_adapter
from autopar.errors import RewriteError
from autopar.ir.graph import Arg, Ref


def resolve_target(target: str, device: str) -> Callable[..., Any]:
    """`aten.linear.default` -> torch.ops.aten.linear.default, or what stands in for it on the device.

    Raises:
        RewriteError: for an unknown name.
    """
    if target == "aten.histc.default" and device == "cpu":
        return histc_of_floats
    try:
        found: Callable[..., Any] = torch_adapter.op_overload(target)
    except (AttributeError, ValueError):
        raise RewriteError(f"no such operation in this torch: {target}") from None
    return found


def histc_of_floats(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """`histc` for integers too, which on the CPU only counts floats; exact up to 2**53 elements."""
    return x.double().histc(bins, low, high).to(x.dtype)


def fill(arg: Arg, inputs: tuple[Any, ...], device: str) -> Any:
    """A call's argument: inputs in place of references, torch objects in place of their names, lists for tuples.

    Args:
        arg: constant or reference.
        inputs: one entry per entry of `Op.inputs`.
        device: where the program runs.
    """
    if isinstance(arg, Ref):
        return inputs[arg.index]
    if isinstance(arg, tuple):
        return [fill(item, inputs, device) for item in arg]
    return torch_adapter.decode_constant(arg, device)
