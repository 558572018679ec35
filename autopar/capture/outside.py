"""The values of a graph that no op makes: what the placeholders of an exported program stand for.

Parameters and buffers are named after their place in the model, so that those of layers which a shortened trace leaves
out get the names that a full trace gives them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from autopar.capture.calls import ValueRef
from autopar.capture.shorten import Shortened
from autopar.capture.trace import Outside
from autopar.errors import CaptureError

ORIGINS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}
_INITIALS = {"parameter": "p", "buffer": "b"}


@dataclass(frozen=True)
class Wrapped:
    """What `lift` needs.

    Attributes:
        prefix: of the user's model inside the exported module, e.g. `model.`.
        keys: key of every tensor input, in order.
        batch_size: inputs whose dim 0 has this size are batched.
        sites: the layers of a shortened export, by paths without the prefix; None: the whole model was exported.
        returned: keys of what the module returns, for inference; (): it returns the loss.
    """

    name: str
    user_file: str | None
    prefix: str
    exported: torch.export.ExportedProgram
    module: torch.nn.Module
    keys: tuple[str, ...]
    batch_size: int
    sites: Shortened | None = None
    returned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A placeholder that became a value; `constant` is the tensor of an origin of that name."""

    outside: Outside
    fqn: str
    constant: torch.Tensor | None = None


def outside_values(wrapped: Wrapped) -> tuple[list[Entry], list[Any]]:
    """Values from outside, and what stands for each placeholder; tied parameters are one value."""
    held, names = _held_values(wrapped)
    others: list[Entry] = []
    stands: list[Any] = []
    keys = iter(wrapped.keys)
    exported = wrapped.exported
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            stands.append(spec.arg.value)
            continue
        if spec.kind not in ORIGINS or not isinstance(spec.arg, TensorArgument):
            raise CaptureError(f"{wrapped.name}: cannot capture an input of kind {spec.kind.name} ({spec.arg.name})")
        origin = ORIGINS[spec.kind]
        if origin in _INITIALS:
            stands.append(ValueRef(names[str(spec.target)]))
            continue
        constant = exported.constants[str(spec.target)] if origin == "constant" else None
        fqn = next(keys) if origin == "input" else str(spec.target).removeprefix(wrapped.prefix)
        name = node.name if origin == "input" else _short_name(node.name, wrapped.prefix)
        stands.append(ValueRef(name))
        others.append(Entry(Outside(name, origin, _stand_in(node.meta["val"])), fqn, constant))
    return [*held, *others], stands


def _held_values(wrapped: Wrapped) -> tuple[list[Entry], dict[str, str]]:
    """Parameters and buffers of the whole module in its order, and value names by path in the module."""
    entries: list[Entry] = []
    names: dict[str, str] = {}
    tied: dict[int, str] = {}
    used: set[str] = set()
    for origin, path, tensor in _held_tensors(wrapped.module):
        fqn = path.removeprefix(wrapped.prefix)
        if id(tensor) not in tied:
            name = _unused(f"{_INITIALS[origin]}_{re.sub('[^a-z0-9]', '_', fqn.lower())}", used)
            used.add(name)
            tied[id(tensor)] = name
            stand_in = _stand_in(tensor).requires_grad_(tensor.requires_grad)
            entries.append(Entry(Outside(name, origin, stand_in), fqn))
        names[path] = tied[id(tensor)]
    return entries, names


def _held_tensors(module: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for path, parameter in module.named_parameters(remove_duplicate=False):
        yield "parameter", path, parameter
    for path, buffer in module.named_buffers(remove_duplicate=False):
        yield "buffer", path, buffer


def _unused(name: str, used: set[str]) -> str:
    count, unused = 0, name
    while unused in used:
        count += 1
        unused = f"{name}_{count}"
    return unused


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _short_name(node_name: str, prefix: str) -> str:
    """`c_model_lifted_tensor_0` without the wrapper's part: `c_lifted_tensor_0`."""
    kind, _, rest = node_name.partition("_")
    return f"{kind}_{rest.removeprefix(prefix.replace('.', '_'))}"
