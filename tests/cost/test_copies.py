"""What a product keeps of an operand that moved, where the operand's maker keeps it too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from autopar.cost.copies import copied_bytes
from autopar.cost.stages import stage_costs
from autopar.cost.table import CostTables
from autopar.ir.cost import CostNode
from autopar.ir.mesh import stage_mesh
from tests.cost.decide import decide
from tests.cost.devices import plain_cluster
from tests.toy_graphs import mlp_graph

TABLES = CostTables(mlp_graph(8, (16, 16, 16)), plain_cluster())
"""Its relu keeps its result, which the second product reads."""
SIZE = 8 * 16 * 4
COUNT = 2


def picker(relu: str, product: str) -> Callable[[CostNode], int]:
    labels = {"relu": relu, "linear": product}

    def pick(node: CostNode) -> int:
        label = labels.get(node.names[0].rsplit("_", 1)[0], "replicate")
        return next((i for i, choice in enumerate(node.choices) if choice[0].label == label), 0)

    return pick


def found(relu: str, product: str) -> tuple[dict[int, float], float]:
    """What is copied, and activations of the stage beside those of the nodes."""
    table, pick = TABLES.table(stage_mesh(2), COUNT), picker(relu, product)
    assert table is not None
    decisions = decide(table, pick)
    (cost,) = stage_costs(TABLES, table, decisions)
    own = sum(float(node.activation_bytes[pick(node)]) * len(node.blocks) for node in table.nodes)
    return dict(copied_bytes(TABLES, table, decisions)), cost.activation_bytes - own


@pytest.mark.parametrize("relu", ["replicate", "dim0"])
def test_a_moved_operand_is_kept_in_both_forms(relu: str) -> None:
    copied, more = found(relu, "contract")
    assert copied == {1: SIZE / COUNT / 2}
    assert more == SIZE / COUNT / 2


@pytest.mark.parametrize(("relu", "product"), [("dim1", "contract"), ("replicate", "replicate")])
def test_an_operand_that_stays_as_it_is_made_is_kept_once(relu: str, product: str) -> None:
    assert found(relu, product) == ({}, 0.0)


def test_what_a_split_product_reads_whole_is_its_own_choice_s() -> None:
    assert found("dim1", "columns") == ({}, 0.0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_copies_are_of_the_mesh_of_the_stage(ranks: int) -> None:
    """Where stages have meshes of their own, the one that is asked about is the table's."""
    table = TABLES.table(stage_mesh(ranks), COUNT)
    assert table is not None
    elsewhere = replace(decide(table, picker("dim0", "contract")), mesh=stage_mesh(1))
    assert copied_bytes(TABLES, table, elsewhere) == {1: SIZE / COUNT / ranks}
