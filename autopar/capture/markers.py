"""Operators that stand in a trace for the bounds of a layer, or for a whole layer that is not traced.

`enter` and `leave` pass their tensors on unchanged (as aliases); `skipped` makes tensors that look like a layer's
results. All three are composite, so that export keeps them as one node each and autograd sees through them.
They never reach an OpGraph: `capture.expand` takes them out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from autopar import torch_adapter

ENTER, LEAVE, SKIPPED = "autopar.enter.default", "autopar.leave.default", "autopar.skipped.default"
MARKERS = (ENTER, LEAVE, SKIPPED)


def _pass_on(values: Sequence[torch.Tensor], site: int) -> list[torch.Tensor]:
    return [torch.ops.aten.alias.default(value) for value in values]


def _stand_in(values: Sequence[torch.Tensor], site: int, results: str) -> list[torch.Tensor]:
    return [_result(values, spec) for spec in json.loads(results)]


def _result(values: Sequence[torch.Tensor], spec: dict[str, Any]) -> torch.Tensor:
    if "input" in spec:
        alias: torch.Tensor = torch.ops.aten.alias.default(values[spec["input"]])
        return alias
    made = torch.empty_strided(spec["shape"], spec["stride"], dtype=torch_adapter.dtype_of(spec["dtype"]))
    # The clone of a leaf is, like the result of a layer, no leaf.
    return made.requires_grad_().clone() if spec["requires_grad"] else made


def _define() -> None:
    """Register the operators, once in the life of the process."""
    if hasattr(torch.ops.autopar, "skipped"):
        return
    for name in ("enter", "leave"):
        torch.library.define(f"autopar::{name}", "(Tensor[] values, int site) -> Tensor[]")
        torch.library.impl(f"autopar::{name}", "CompositeImplicitAutograd", _pass_on)
    torch.library.define("autopar::skipped", "(Tensor[] values, int site, str results) -> Tensor[]")
    torch.library.impl("autopar::skipped", "CompositeImplicitAutograd", _stand_in)


_define()


def enter(values: Sequence[torch.Tensor], site: int) -> list[torch.Tensor]:
    """The tensors that a traced layer starts from; `site` numbers the layer."""
    return list(torch.ops.autopar.enter(values, site))


def leave(values: Sequence[torch.Tensor], site: int) -> list[torch.Tensor]:
    """The tensors that a traced layer returns."""
    return list(torch.ops.autopar.leave(values, site))


def skipped(values: Sequence[torch.Tensor], site: int, results: str) -> list[torch.Tensor]:
    """What an untraced layer returns; `results` is made by `result_specs`."""
    return list(torch.ops.autopar.skipped(values, site, results))


def result_specs(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> str | None:
    """JSON of what `skipped` must make to look like `outputs`; None if it cannot, because they share memory.

    An output that is an input itself stays that input.
    """
    specs: list[dict[str, Any]] = []
    storages = {torch_adapter.storage_key(value) for value in inputs}
    for output in outputs:
        same = [index for index, value in enumerate(inputs) if value is output]
        if same:
            specs.append({"input": same[0]})
            continue
        key = torch_adapter.storage_key(output)
        if key in storages or output.storage_offset() or not _is_dense(output):
            return None
        storages.add(key)
        shape, stride = list(output.shape), list(output.stride())
        dtype = torch_adapter.dtype_name(output.dtype)
        specs.append({"shape": shape, "stride": stride, "dtype": dtype, "requires_grad": output.requires_grad})
    return json.dumps(specs)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Every element of the storage's span once: what `clone` keeps the strides of."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
