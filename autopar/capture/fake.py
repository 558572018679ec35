"""Tracing without memory as if on a CPU: fake tensors in place of a module's meta tensors.

Code may ask on which device it runs (and transformers does, for masks, mixtures of experts and layouts), so a graph
traced on meta tensors may differ from the one that runs. Fake tensors have no memory either, but say `cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autopar import torch_adapter


@contextmanager
def fake_tensors(module: torch.nn.Module, batch: Any) -> Iterator[Any]:
    """Within the context the module holds fake tensors; yields the batch as fake tensors. Ties are kept."""
    faker = torch_adapter.Faker()
    places = list(_places(module))
    try:
        for owner, name, tensor in places:
            setattr(owner, name, faker.fake(tensor))
        yield torch_adapter.tree_map(lambda leaf: faker.fake(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)
    finally:
        for owner, name, tensor in places:
            setattr(owner, name, tensor)


def _places(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Every parameter, buffer and plain tensor attribute with its owner, tied ones at each place."""
    for owner in module.modules():
        parameters = owner.named_parameters(recurse=False, remove_duplicate=False)
        buffers = owner.named_buffers(recurse=False, remove_duplicate=False)
        held = [*parameters, *buffers, *vars(owner).items()]
        yield from ((owner, name, tensor) for name, tensor in held if isinstance(tensor, torch.Tensor))
