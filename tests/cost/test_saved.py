"""Predicted activation memory against what autograd really keeps, on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopar.capture.export import capture
from autopar.cost.hardware import load_cluster
from autopar.cost.table import CostTables
from autopar.ir.mesh import stage_mesh
from tests.capture.models import source
from tests.cost.devices import plain_cluster


def kept_bytes(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of all storages that backward needs, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*args, **kwargs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "resnet", "mlp"])
def test_activations_are_not_below_what_autograd_keeps_nor_far_above(name: str) -> None:
    example = source(name)
    captured = capture(example, device="cpu")
    table = CostTables(captured.graph, load_cluster("cpu", 1)).table(stage_mesh(1), 1)
    assert table is not None
    predicted = sum(float(node.activation_bytes[0]) * len(node.blocks) for node in table.nodes)
    real = kept_bytes(captured.module, *example.example_batch())
    assert real <= predicted * (1 + 1e-9)
    assert predicted <= 1.15 * real


def test_a_product_keeps_what_it_gathered_beside_what_the_maker_keeps() -> None:
    """Relu keeps its result, of 4 width elements a row: a product by columns keeps it whole, by rows as it is cut."""
    graph = capture(source("mlp"), device="cpu").graph
    relu = next(op for op in graph.ops if op.target == "aten.relu.default")
    size = graph.values[relu.outputs[0]].meta.num_bytes
    table = CostTables(graph, plain_cluster()).table(stage_mesh(2), 1)
    assert table is not None
    reader = next(op for op in graph.ops if relu.outputs[0] in op.inputs)
    node = next(node for node in table.nodes if reader.name in node.names)
    kept = {choice[0].label: float(own) for choice, own in zip(node.choices, node.activation_bytes, strict=True)}
    slot = reader.inputs.index(relu.outputs[0])
    for choice in node.choices:
        is_gathered = choice[0].splits_work and not choice[0].inputs[slot].is_shard
        assert kept[choice[0].label] == (size if is_gathered else 0.0)
    assert set(kept.values()) == {0.0, float(size)}
