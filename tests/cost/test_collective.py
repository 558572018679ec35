"""Collective formulas against values worked out by hand, and properties that hold for any link."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.collective import COLLECTIVES, collective_cost, send_cost
from autopar.cost.device import Link
from autopar.cost.topology import CUBE_MESH, ring_share
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
        # a ring of 16 leaves the node once: 2 * 15/16 * 1e9 over its 8 GB/s port; 7 hops inside, one tree level
        ("all_reduce", Group(16, 1), 1e9, 1.875 / 8 + 17e-6 + 34e-6),
        # half of 14 inner hops and of one outer hop
        ("all_gather", Group(16, 1), 1e9, 0.9375 / 8 + 10e-6 + 7e-6 + 30e-6 + 2e-6),
        # 2 of 4 members in each node have 2 of its 8 shares
        ("reduce_scatter", Group(4, 4), 1e9, 0.75 / 2 + 10e-6 + 1e-6 + 30e-6 + 2e-6),
        # 7 of 16 peers are inside, 8 of 16 parts leave the node
        ("all_to_all", Group(16, 1), 1e9, 7 / 16 * 0.1 + 0.5 + 10e-6 + 7e-6 + 30e-6 + 2e-6),
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
    # 16 ranks, all_gather: each passes 15/16 on, one of the 8 of a node at 0.6 nJ, the others at 0.2 nJ
    expected = 15 / 16 * (7 * 2e-10 + 6e-10) / 8
    assert collective_cost(CLUSTER, "all_gather", Group(16, 1)).j_per_byte == pytest.approx(expected)


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


def test_a_switch_that_adds_serves_all_reduce_in_a_node_alone() -> None:
    adding = plain_cluster(16, 8, intra_node=replace(FAST, reduction_bytes_per_s=9e9), inter_node=SLOW)
    for kind in COLLECTIVES:
        for group in (Group(2, 1), Group(4, 1), Group(8, 1), Group(16, 1), Group(2, 8)):
            with_switch, without = collective_cost(adding, kind, group), collective_cost(CLUSTER, kind, group)
            if (kind, group) == ("all_reduce", Group(8, 1)):
                # each GPU sends its byte and an eighth of the sum at 9 GB/s, instead of 14/8 at 10 GB/s
                assert with_switch.s_per_byte == pytest.approx(9 / 8 / 9e9)
            elif (kind, group) == ("all_reduce", Group(4, 1)):
                assert with_switch.s_per_byte == pytest.approx(5 / 4 / 9e9)
            else:
                assert with_switch == without


def test_filling_a_ring_weighs_most_on_two_members() -> None:
    filled = plain_cluster(16, 8, intra_node=replace(FAST, ring_fill=0.5), inter_node=SLOW)
    rise = {
        n: collective_cost(filled, "all_reduce", Group(n, 1)).s_per_byte
        / collective_cost(CLUSTER, "all_reduce", Group(n, 1)).s_per_byte
        for n in (2, 4, 8)
    }
    assert rise == {n: pytest.approx(1 + 0.5 / (2 * (n - 1))) for n in rise}


def test_groups_of_a_node_share_its_ports() -> None:
    """One group of 8 per node has all ports; of 8 groups with one member there, each has an eighth."""
    alone, half, shared = (
        collective_cost(CLUSTER, "all_gather", Group(2 * inside, 8 // inside)).s_per_byte / (2 * inside - 1) * inside
        for inside in (8, 4, 1)
    )
    assert half == pytest.approx(2 * alone)
    assert shared == pytest.approx(8 * alone)
    faster = replace(CLUSTER, network_bytes_per_s=2 * SLOW.bandwidth_bytes_per_s)
    for kind in COLLECTIVES:
        slope = collective_cost(CLUSTER, kind, Group(2, 8)).s_per_byte
        assert collective_cost(faster, kind, Group(2, 8)).s_per_byte == pytest.approx(slope / 2)


def test_groups_across_the_halves_of_a_node_share_its_bridge() -> None:
    bridged = plain_cluster(8, 8, intra_node=replace(FAST, bridge_bytes_per_s=2e10), inter_node=SLOW)
    for group, ratio in ((Group(4, 1), 1), (Group(8, 1), 1), (Group(4, 2), 1), (Group(2, 4), 2)):
        slope = collective_cost(CLUSTER, "all_gather", group).s_per_byte
        assert collective_cost(bridged, "all_gather", group).s_per_byte == pytest.approx(ratio * slope)
    # 8 ranks exchange 16 of 64 parts per direction over the bridge: B/8 * 16 / 20 GB/s
    assert collective_cost(bridged, "all_to_all", Group(8, 1)).s_per_byte == pytest.approx(2 / 2e10)


def test_efficiency_of_the_network_scales_what_a_user_gave() -> None:
    slow = replace(SLOW, efficiency=0.5)
    given = replace(plain_cluster(16, 8, inter_node=slow), network_bytes_per_s=3.2e10)
    assert given.network_share_bytes_per_s == pytest.approx(2e9)
    assert plain_cluster(16, 8, inter_node=slow).network_share_bytes_per_s == pytest.approx(5e8)


POSITIVE = st.floats(1e8, 1e12)
LINKS = st.builds(
    Link,
    bandwidth_bytes_per_s=POSITIVE,
    latency_s=st.floats(0, 1e-3),
    latency_per_hop_s=st.floats(0, 1e-4),
    p2p_latency_s=st.floats(0, 1e-3),
    j_per_byte=st.floats(0, 1e-9),
    efficiency=st.floats(0.1, 1),
    ring_fill=st.floats(0, 1),
    bridge_bytes_per_s=POSITIVE,
)
KINDS = st.sampled_from(COLLECTIVES)
GROUPS = st.builds(Group, size=st.sampled_from((2, 4, 8, 16, 32)), stride=st.sampled_from((1, 2, 4, 8)))
BYTES = st.floats(0, 1e10)


@settings(max_examples=60, deadline=None)
@given(LINKS, LINKS, KINDS, GROUPS, st.tuples(BYTES, BYTES))
def test_more_bytes_never_take_less(
    fast: Link, slow: Link, kind: str, group: Group, num_bytes: tuple[float, float]
) -> None:
    cost = collective_cost(plain_cluster(64, 8, intra_node=fast, inter_node=slow), kind, group)
    assert cost.time_s(min(num_bytes)) <= cost.time_s(max(num_bytes))
    assert cost.latency_s >= 0
    assert cost.s_per_byte > 0


@settings(max_examples=60, deadline=None)
@given(LINKS, LINKS, KINDS, GROUPS, st.tuples(st.floats(1, 10), st.floats(1, 10)))
def test_faster_links_never_take_longer(
    fast: Link, slow: Link, kind: str, group: Group, faster: tuple[float, float]
) -> None:
    inner, outer = faster
    fast = replace(fast, reduction_bytes_per_s=fast.bandwidth_bytes_per_s)
    quick = replace(
        fast,
        bandwidth_bytes_per_s=fast.bandwidth_bytes_per_s * inner,
        reduction_bytes_per_s=fast.reduction_bytes_per_s * inner,
        bridge_bytes_per_s=fast.bridge_bytes_per_s * inner,
    )
    rapid = replace(slow, bandwidth_bytes_per_s=slow.bandwidth_bytes_per_s * outer)
    before = collective_cost(plain_cluster(64, 8, intra_node=fast, inter_node=slow), kind, group)
    after = collective_cost(plain_cluster(64, 8, intra_node=quick, inter_node=rapid), kind, group)
    assert after.s_per_byte <= before.s_per_byte * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(LINKS, LINKS, st.sampled_from(("all_reduce", "all_gather", "reduce_scatter")), BYTES)
def test_more_members_never_take_less_under_a_switch(fast: Link, slow: Link, kind: str, num_bytes: float) -> None:
    """With equal bytes; not where a switch adds (fewer bytes per GPU), nor in meshes (more rings)."""
    cluster = plain_cluster(64, 8, intra_node=fast, inter_node=slow)
    times = [collective_cost(cluster, kind, Group(size, 1)).time_s(num_bytes) for size in (2, 4, 8)]
    assert times == sorted(times)
    across = [collective_cost(cluster, kind, Group(size, 1)).time_s(num_bytes) for size in (16, 32, 64)]
    assert across == sorted(across)


def test_cube_mesh_has_the_rings_that_were_measured() -> None:
    # VIA-Research/vTrain, 2 to 8 V100: bus bandwidth over that of one link, 22.5 GB/s; 5 GPUs run on a chain
    assert [6 * ring_share("nvlink-mesh", n, 1, 8) for n in range(2, 9)] == pytest.approx([1, 2, 4, 1.6, 2, 4, 6])
    assert 6 * ring_share("nvlink-mesh-paired", 2, 1, 8) == pytest.approx(2)
    # GPUs 0 and 4 share two links, 3 and 7 one: the slowest of the four groups counts
    assert 6 * ring_share("nvlink-mesh", 2, 4, 8) == pytest.approx(1)
    assert all(count <= 2 for count in CUBE_MESH.values())
    assert all(sum(count for edge, count in CUBE_MESH.items() if gpu in edge) == 6 for gpu in range(8))


def test_without_a_switch_small_groups_and_sends_use_few_links() -> None:
    assert [7 * ring_share("xgmi-mesh", n, 1, 8) for n in (2, 4, 8)] == pytest.approx([1, 3, 7])
    assert [ring_share("nvswitch", n, 1, 8) for n in (2, 4, 8)] == [1, 1, 1]
    mesh, switch = (plain_cluster(8, 8, intra_node=FAST, topology=name) for name in ("nvlink-mesh", "nvswitch"))
    assert send_cost(mesh, same_node=True).s_per_byte == pytest.approx(6 * send_cost(switch, same_node=True).s_per_byte)
    # 0 and 1 share one link of six: each of 4 GPUs sends a quarter over it to its slowest peer
    assert collective_cost(mesh, "all_to_all", Group(4, 1)).s_per_byte == pytest.approx(0.25 / (1e10 / 6))
