"""Collective formulas against values worked out by hand."""

from __future__ import annotations

import pytest

from autopar.cost.collective import COLLECTIVES, collective_cost, send_cost
from autopar.cost.device import Link
from autopar.ir.mesh import Group
from tests.cost.devices import plain_cluster

FAST = Link(1e10, 10e-6, 1e-6, 5e-6, 2e-10)
SLOW = Link(8e9, 30e-6, 4e-6, 7e-6, 6e-10)
CLUSTER = plain_cluster(num_gpus=16, gpus_per_node=8, intra_node=FAST, inter_node=SLOW)


@pytest.mark.parametrize(
    ("kind", "group", "num_bytes", "seconds"),
    [
        # 4 ranks in a node: 2 * 3/4 * 1e9 bytes over 10 GB/s, 10 us + 3 hops
        ("all_reduce", Group(4, 1), 1e9, 0.15 + 13e-6),
        ("all_gather", Group(4, 1), 1e9, 0.075 + 11.5e-6),
        ("reduce_scatter", Group(4, 2), 1e9, 0.075 + 11.5e-6),
        ("all_to_all", Group(4, 1), 1e9, 0.075 + 11.5e-6),
        # 2 ranks in 2 nodes (stride 8): a device's share of the 8 GB/s port is 1 GB/s
        ("all_reduce", Group(2, 8), 1e9, 1.0 + 34e-6),
        # 16 ranks: 2 * 7/8 * 1e9 / 1e10 inside, then 2 * 1/2 * 1e9/8 / 1e9 across
        ("all_reduce", Group(16, 1), 1e9, 0.175 + 17e-6 + 0.125 + 34e-6),
        ("all_gather", Group(16, 1), 1e9, 0.0875 + 13.5e-6 + 0.0625 + 32e-6),
        # 7 of 16 peers are inside, 8 of 16 parts leave the node
        ("all_to_all", Group(16, 1), 1e9, 7 / 16 * 0.1 + 13.5e-6 + 0.5 + 32e-6),
    ],
)
def test_collective_takes_its_hand_computed_time(kind: str, group: Group, num_bytes: float, seconds: float) -> None:
    assert collective_cost(CLUSTER, kind, group).time_s(num_bytes) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_group_of_one_is_free(kind: str) -> None:
    assert collective_cost(CLUSTER, kind, Group(1, 1)).time_s(1e9) == 0


def test_all_reduce_equals_reduce_scatter_and_all_gather_in_bandwidth_and_energy() -> None:
    for group in (Group(4, 1), Group(16, 1), Group(2, 8)):
        whole, scatter, gather = (
            collective_cost(CLUSTER, kind, group) for kind in ("all_reduce", "reduce_scatter", "all_gather")
        )
        assert whole.s_per_byte == pytest.approx(scatter.s_per_byte + gather.s_per_byte)
        assert whole.j_per_byte == pytest.approx(scatter.j_per_byte + gather.j_per_byte)


def test_energy_counts_bytes_sent_over_each_link() -> None:
    # 16 ranks, all_gather: 7/8 of a byte inside at 0.2 nJ, 1/2 of 1/8 across at 0.6 nJ
    assert collective_cost(CLUSTER, "all_gather", Group(16, 1)).j_per_byte == pytest.approx(7 / 8 * 2e-10 + 6e-10 / 16)


def test_send_uses_the_link_it_crosses() -> None:
    assert send_cost(CLUSTER, same_node=True).time_s(1e9) == pytest.approx(5e-6 + 0.1)
    assert send_cost(CLUSTER, same_node=False).time_s(1e9) == pytest.approx(7e-6 + 1.0)


def test_members_of_a_node_divide_the_group() -> None:
    six = plain_cluster(num_gpus=6, gpus_per_node=4)
    assert six.members_in_node(Group(6, 1)) == 3
    assert six.members_in_node(Group(3, 2)) == 1


def test_unknown_collective_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        collective_cost(CLUSTER, "broadcast", Group(2, 1))
