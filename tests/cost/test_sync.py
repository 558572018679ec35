"""Prices of policies against hand-computed figures, an event simulation, and the price of a data-parallel plan."""

from __future__ import annotations

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cost.collective import collective_cost, send_cost
from autopar.cost.device import Link
from autopar.cost.hardware import load_cluster
from autopar.cost.sync import Exchanged, Work, apply_cost, price_sync, work_of
from autopar.errors import InputError
from autopar.ir.mesh import Group
from autopar.ir.quantity import Quantity
from autopar.ir.sync import COMPRESSIONS, POLICIES, SyncPolicy, exchange, parse_policy
from tests.cost.devices import plain_cluster

FAST = Link(1e10, 10e-6, 1e-6, 5e-6, 2e-10)
SLOW = Link(8e9, 30e-6, 4e-6, 7e-6, 6e-10)
CLUSTER = plain_cluster(num_gpus=16, gpus_per_node=8, intra_node=FAST, inter_node=SLOW)
WHAT = Exchanged([(1000, 500), (500,)], 4)
COUNT = 500_500
WORK = Work(0.01, 2.0)
EVERY = ("all-reduce", "ps-sync", "ps-async", "local=1", "local=8", "all-reduce+bf16", "all-reduce+fp8",
         "all-reduce+top-k=0.01", "all-reduce+power-sgd=4", "ps-sync+fp8", "ps-async+top-k=0.1")  # fmt: skip


def policies() -> st.SearchStrategy[SyncPolicy]:
    def make(kind: str, compression: str, steps: int, share: float, rank: int) -> SyncPolicy:
        if kind == "local":
            return SyncPolicy(kind, steps)
        compression = "bf16" if kind.startswith("ps") and compression == "power-sgd" else compression
        own = {"top-k": {"share": share}, "power-sgd": {"rank": rank}}.get(compression, {})
        return SyncPolicy(kind, compression=compression, **own)  # type: ignore[arg-type]

    shares = st.integers(1, 1000).map(lambda n: n / 1000)
    return st.builds(
        make, st.sampled_from(POLICIES), st.sampled_from(COMPRESSIONS), st.integers(1, 99), shares, st.integers(1, 64)
    )


@given(policies())
def test_a_policy_is_read_as_it_is_written(policy: SyncPolicy) -> None:
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["", "ring", "all-reduce=2", "local=0", "local=x", "local=8+bf16", "ps-sync+power-sgd=2", "all-reduce+zip",
     "all-reduce+", "all-reduce+bf16=3", "all-reduce+top-k=0", "all-reduce+top-k=2", "all-reduce+power-sgd=0"],
)  # fmt: skip
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-reduce", [("all_reduce", 4 * COUNT)]),
        ("local=3", [("all_reduce", 4 * COUNT)]),
        ("all-reduce+bf16", [("all_reduce", 2 * COUNT)]),
        # 4 parts of 125125 bytes with a scale each
        ("all-reduce+fp8", [("all_to_all", 4 * 125_129), ("all_gather", 4 * 125_129)]),
        # 5005 entries of 4 bytes and their places
        ("all-reduce+top-k=0.01", [("all_gather", 4 * 5005 * 8)]),
        # 4 columns of both factors; the vector is no matrix
        ("all-reduce+power-sgd=4", [("all_reduce", 2000), ("all_reduce", 16_000), ("all_reduce", 8_000)]),
        ("ps-async+fp8", [("push", COUNT + 4), ("pull", 4 * COUNT)]),
    ],
)
def test_what_is_exchanged_was_counted_by_hand(text: str, expected: list[tuple[str, int]]) -> None:
    found = exchange(parse_policy(text), WHAT.shapes, 4, 4)
    assert [(transfer.kind, transfer.num_bytes) for transfer in found] == expected


def test_times_are_sums_of_known_parts() -> None:
    num_bytes, workers = WHAT.num_bytes, 4
    apply_s, _ = apply_cost(CLUSTER, WHAT)
    summed = collective_cost(CLUSTER, "all_reduce", Group(workers, 1)).time_s(num_bytes)
    sent = send_cost(CLUSTER, same_node=True).time_s(num_bytes)
    expected = {
        "all-reduce": 0.01 + summed + apply_s,
        "local=8": 0.01 + summed / 8 + apply_s,
        "ps-sync": 0.01 + 4 * (2 * sent + apply_s) + apply_s,
        "ps-async": max(0.01 + 2 * sent + apply_s, 4 * (2 * sent + apply_s)),
    }
    for text, seconds in expected.items():
        assert price_sync(CLUSTER, parse_policy(text), WHAT, WORK, workers).step_time_s.value == pytest.approx(seconds)


def test_workers_in_other_nodes_push_over_the_network() -> None:
    """A server and 7 workers fill a node, 3 more workers have the other."""
    num_bytes, apply_s = WHAT.num_bytes, apply_cost(CLUSTER, WHAT)[0]
    near_s, far_s = (2 * send_cost(CLUSTER, same_node=same).time_s(num_bytes) + apply_s for same in (True, False))
    assert far_s > near_s
    price = price_sync(CLUSTER, parse_policy("ps-sync"), WHAT, WORK, 10)
    assert price.step_time_s.value == pytest.approx(0.01 + 7 * near_s + 3 * far_s + apply_s)
    price = price_sync(CLUSTER, parse_policy("ps-async"), WHAT, WORK, 10)
    assert price.step_time_s.value == pytest.approx(max(0.01 + far_s, 7 * near_s + 3 * far_s))


def simulated_s(compute_s: float, serve_s: float, workers: int, rounds: int = 400) -> float:
    """Seconds per gradient of each worker, when a server takes one gradient after another: an event simulation."""
    events = [(compute_s, worker) for worker in range(workers)]
    heapq.heapify(events)
    free, done = 0.0, []
    for _ in range(rounds * workers):
        arrival, worker = heapq.heappop(events)
        free = max(free, arrival) + serve_s
        done.append(free)
        heapq.heappush(events, (free + compute_s, worker))
    half = len(done) // 2
    return (done[-1] - done[half]) / (len(done) - 1 - half) * workers


@pytest.mark.parametrize(("workers", "compute_s"), list(itertools.product((1, 2, 5), (0.0, 1e-4, 1e-3, 1e-2))))
def test_an_asynchronous_step_is_that_of_the_simulated_queue(workers: int, compute_s: float) -> None:
    policy = parse_policy("ps-async")
    price = price_sync(CLUSTER, policy, WHAT, Work(compute_s, 0.0), workers)
    assert price.step_time_s.value == pytest.approx(simulated_s(compute_s, price.exchange_s, workers), rel=1e-2)
    assert price.staleness == workers - 1


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("workers", [1, 2, 8, 12])
def test_energy_is_fixed_power_for_the_time_and_dynamic_energy(text: str, workers: int) -> None:
    policy = parse_policy(text)
    price = price_sync(CLUSTER, policy, WHAT, WORK, workers)
    processes = policy.num_processes(workers)
    spec = CLUSTER.spec
    assert price.fixed_w == spec.blocked_w * processes + spec.host_w_per_node * -(-processes // 8)
    assert price.dynamic_j >= workers * WORK.compute_j
    time_s = price.step_time_s
    assert price.energy_j.value == pytest.approx(price.dynamic_j + price.fixed_w * time_s.value)
    assert price.average_power_w.value == pytest.approx(price.energy_j.value / time_s.value)
    at_same = price.energy_at(Quantity(time_s.value, "s", "measured", time_s.value, time_s.value))
    assert at_same.value == pytest.approx(price.energy_j.value)
    assert at_same.label == "modelled"


@pytest.mark.parametrize("text", ["all-reduce", "local=4", "all-reduce+bf16", "all-reduce+fp8", "all-reduce+top-k=0.1"])
def test_one_worker_without_a_server_is_serial(text: str) -> None:
    alone, serial = (price_sync(CLUSTER, parse_policy(t), WHAT, WORK, 1) for t in (text, "all-reduce"))
    assert (alone.step_time_s, alone.energy_j) == (serial.step_time_s, serial.energy_j)
    assert alone.sent_bytes == alone.exchange_s == 0


@given(st.integers(1, 64), st.integers(2, 16))
def test_rarer_averaging_is_never_slower_nor_takes_more_energy(steps: int, workers: int) -> None:
    often, rarely = (
        price_sync(CLUSTER, SyncPolicy("local", every), WHAT, WORK, workers) for every in (steps, steps + 1)
    )
    assert rarely.step_time_s.value <= often.step_time_s.value
    assert rarely.energy_j.value <= often.energy_j.value
    assert rarely.sent_bytes < often.sent_bytes


def test_compressed_bytes_are_fewer_and_their_price_falls_with_them() -> None:
    big = Exchanged([(4000, 4000)], 4)
    plain, *coded = (
        price_sync(CLUSTER, parse_policy(text), big, WORK, 8)
        for text in ("all-reduce", "all-reduce+bf16", "all-reduce+fp8", "all-reduce+top-k=0.01")
    )
    for price in coded:
        assert price.sent_bytes < plain.sent_bytes
        assert price.exchange_s < plain.exchange_s
        assert price.energy_j.value < plain.energy_j.value


def test_work_of_known_time_draws_no_more_than_the_device_may() -> None:
    cluster = load_cluster("cpu", 2)
    work = work_of(cluster, 2.0)
    assert 0 < work.compute_j <= 2.0 * (cluster.spec.limit_w - cluster.spec.blocked_w)
