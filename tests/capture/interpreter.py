"""A minimal executor of OpGraphs: the proof that the IR holds the whole program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.export import Captured
from autopar.ir.graph import Op, Ref


def outside_tensors(captured: Captured) -> dict[str, torch.Tensor]:
    """Every value that no op makes, by name."""
    return {v.name: captured.tensor(v.name) for v in captured.graph.values.values() if v.origin != "op"}


def decode(argument: Any, inputs: list[torch.Tensor]) -> Any:
    if isinstance(argument, Ref):
        return inputs[argument.index]
    if isinstance(argument, tuple):
        return [decode(part, inputs) for part in argument]
    return torch_adapter.decode_constant(argument, "cpu")


def run_op(op: Op, env: dict[str, torch.Tensor]) -> None:
    """Run one op, or a region's members one by one, adding its outputs to `env`."""
    if op.members:
        for member in op.members:
            run_op(member, env)
        return
    inputs = [env[name] for name in op.inputs]
    args = [decode(argument, inputs) for argument in op.args]
    kwargs = {key: decode(argument, inputs) for key, argument in op.kwargs.items()}
    result = torch_adapter.call(op.target, args, kwargs)
    results = (result,) if isinstance(result, torch.Tensor) else tuple(result or ())
    env.update(zip(op.outputs, results, strict=True))


def run_graph(captured: Captured, given: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """All values after running every op; `given` replaces values from outside."""
    env = {**outside_tensors(captured), **(given or {})}
    for op in captured.graph.ops:
        run_op(op, env)
    return env
