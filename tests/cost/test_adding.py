"""Adding gradients: to those of earlier microbatches, and to an earlier reader's, also beside measured ops."""

from __future__ import annotations

import pytest

from autopar.cost.table import CostTables
from autopar.ir.cost import CostNode
from autopar.ir.mesh import stage_mesh
from autopar.ir.profile import OpProfile, ProfileKey
from autopar.ir.software import Software
from tests.cost.devices import plain_cluster
from tests.toy_graphs import mlp_graph, residual_graph

OURS = Software(overlap_gradients=True, prefetch_parameters=True)
BYTES_PER_S = 1e11
"""Of the plain cluster's memory."""
WEIGHT = 16 * 16 * 4


class Measured:
    """Every op takes 1 s forward and 2 s backward."""

    device = "cpu"

    def has_target(self, target: str) -> bool:
        return target.startswith("aten.")

    def find(self, key: ProfileKey) -> OpProfile:
        return OpProfile(key, 1.0, 2.0, 0.0, None, None, 1, {})


def parameter(label: str, num_microbatches: int) -> tuple[CostNode, int]:
    tables = CostTables(mlp_graph(8, (16, 16, 16)), plain_cluster(), software=OURS)
    table = tables.table(stage_mesh(2), num_microbatches)
    assert table is not None
    node = next(node for node in table.nodes if node.names == ("linear_1_weight",))
    return node, next(i for i, choice in enumerate(node.choices) if choice[0].label == label)


@pytest.mark.parametrize(("label", "parts"), [("replicated", 1), ("zero1", 1), ("zero3", 2)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_stays_of_a_gradient_is_added_to_that_of_earlier_microbatches(label: str, parts: int, count: int) -> None:
    node, index = parameter(label, count)
    assert node.traffic is not None
    expected = 3 * (1 - 1 / count) * WEIGHT / parts / BYTES_PER_S
    assert node.traffic.adding_s[index] == pytest.approx(expected)
    assert node.backward_s[index] >= expected


def test_a_measured_op_does_not_contain_what_meets_its_gradient() -> None:
    """`x + f(x)`: the second reader's gradient of x comes to the first's, which reads two and writes one."""
    graph = residual_graph(layers=3)
    tables = CostTables(graph, plain_cluster(), profile=Measured(), software=OURS)
    table = tables.table(stage_mesh(1), 1)
    assert table is not None
    read = graph.values["add_0"]
    readers = [op.name for op in graph.ops if "add_0" in op.inputs]
    ops = [node for node in table.nodes if node.kind == "op"]
    found = {name: float(node.backward_s[0]) for node in ops for name in node.names if name in readers}
    assert len(found) == 2
    assert sorted(found.values()) == pytest.approx([2.0, 2.0 + 3 * read.meta.num_bytes / BYTES_PER_S], rel=1e-12)


def test_a_measured_product_of_software_that_adds_as_it_goes_adds_for_earlier_microbatches() -> None:
    graph = mlp_graph(8, (16, 16, 16))
    tables = CostTables(graph, plain_cluster(), profile=Measured(), software=Software())
    found = []
    for count in (1, 4):
        table = tables.table(stage_mesh(1), count)
        assert table is not None
        node = next(node for node in table.nodes if node.names == ("linear_1",))
        found.append(float(node.backward_s[0]))
    added = 3 * 0.75 * (WEIGHT + 16 * 4) / BYTES_PER_S
    assert found == pytest.approx([2.0, 2.0 + added], rel=1e-12)
