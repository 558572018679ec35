"""Policies that keep replicas in step, on real processes, against all-reduce and against what is priced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopar.ir.sync import exchange, parse_policy
from tests.dist.ranks import run_on
from tests.dist.sync_worker import INPUTS, make_task, shapes_of, train_all

pytestmark = pytest.mark.dist
STEPS, WARM_UP, CONVEX_STEPS = 6, 2, 150
SUMMED = ("all-reduce", "local=1", "local=3", "all-reduce+bf16", "all-reduce+fp8", "all-reduce+top-k=0.25",
          "all-reduce+power-sgd=1")  # fmt: skip
SERVED = ("ps-sync", "ps-async", "ps-sync+bf16", "ps-sync+fp8", "ps-sync+top-k=0.25")
PLAIN = {"steps": STEPS, "rate": 0.05}
CONVEX = {"steps": CONVEX_STEPS, "rate": 0.2}
Results = list[dict[str, dict[str, Any]]]


def run(num_processes: int, trainings: list[tuple[str, str, str, dict[str, Any]]]) -> Results:
    """Results by rank and name."""
    entry = f"{train_all.__module__}:{train_all.__name__}"
    return run_on(num_processes, entry, {"trainings": trainings})


@pytest.fixture(scope="module")
def two() -> Results:
    """What two processes do."""
    momentum = {**PLAIN, "momentum": 0.9}
    plain = [(text, "network", text, PLAIN) for text in (*SUMMED, "ps-sync")]
    return run(2, [*plain, *((f"{text} momentum", "network", text, momentum) for text in ("all-reduce", "local=1"))])


@pytest.fixture(scope="module")
def three() -> Results:
    """What a server and two workers do."""
    convex = [(f"{text} convex", "convex", text, CONVEX) for text in ("ps-async", "ps-async+bf16")]
    return run(3, [*((text, "network", text, PLAIN) for text in SERVED), *convex])


def serial() -> tuple[torch.Tensor, list[float]]:
    """The same steps over all samples in this process, by plain torch."""
    task = make_task(0, 1)
    optimizer = torch.optim.SGD(task.parameters, lr=0.05)
    losses = []
    for step in range(WARM_UP + STEPS):
        optimizer.zero_grad()
        losses.append(task.gradient(step))
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in task.parameters]), losses


def values(result: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(result["values"], dtype=torch.float64)


def test_all_reduce_is_the_serial_program(two: Results) -> None:
    expected, losses = serial()
    for rank in two:
        torch.testing.assert_close(values(rank["all-reduce"]), expected, rtol=1e-10, atol=1e-10)
        assert rank["all-reduce"]["losses"] == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize("fixture", ["two", "three"])
def test_a_synchronous_server_is_all_reduce(fixture: str, request: pytest.FixtureRequest) -> None:
    results: Results = request.getfixturevalue(fixture)
    expected, losses = serial()
    for rank in results:
        torch.testing.assert_close(values(rank["ps-sync"]), expected, rtol=1e-10, atol=1e-10)
        assert rank["ps-sync"]["losses"] == pytest.approx(losses, rel=1e-10)
        assert rank["ps-sync"]["staleness"] == [[0, STEPS * (len(results) - 1)]]


def test_averaging_after_every_step_is_all_reduce_and_after_three_is_not(two: Results) -> None:
    plain, every, third = (two[0][text] for text in ("all-reduce", "local=1", "local=3"))
    torch.testing.assert_close(values(every), values(plain), rtol=1e-10, atol=1e-10)
    assert float((values(third) - values(plain)).abs().max()) > 1e-6
    assert third["values"] == two[1]["local=3"]["values"]


def test_momentum_keeps_averaging_after_every_step_equal(two: Results) -> None:
    plain, every = (values(two[0][f"{text} momentum"]) for text in ("all-reduce", "local=1"))
    torch.testing.assert_close(every, plain, rtol=1e-10, atol=1e-10)
    assert float((plain - values(two[0]["all-reduce"])).abs().max()) > 1e-6


@pytest.mark.parametrize("text", SUMMED)
def test_replicas_end_equal_and_what_was_sent_is_what_is_priced(text: str, two: Results) -> None:
    policy, (first, second) = parse_policy(text), (rank[text] for rank in two)
    assert first["values"] == second["values"]
    steps = STEPS + WARM_UP
    whole = exchange(parse_policy("all-reduce"), shapes_of("network"), 8, 2)
    expected: dict[tuple[str, int], int] = {}
    for step in range(steps):
        if policy.kind == "local" and (step + 1) % policy.local_steps and step + 1 < steps:
            continue
        is_whole = policy.compression == "power-sgd" and step < WARM_UP
        for transfer in whole if is_whole else exchange(policy, shapes_of("network"), 8, 2):
            key = (transfer.kind, transfer.num_bytes)
            expected[key] = expected.get(key, 0) + 1
    for found in (first, second):
        assert {(kind, size): count for kind, size, count in found["sent"]} == expected


@pytest.mark.parametrize("text", SUMMED[3:])
def test_compressed_gradients_lead_near_to_where_whole_ones_lead(text: str, two: Results) -> None:
    start = torch.cat([p.detach().reshape(-1) for p in make_task(0, 1).parameters])
    whole, coded = (values(two[0][name]) - start for name in ("all-reduce", text))
    assert 0 < float((coded - whole).norm()) < 0.8 * float(whole.norm())


@pytest.mark.parametrize("text", SERVED)
def test_what_goes_to_and_from_a_server_is_what_is_priced(text: str, three: Results) -> None:
    steps = STEPS + WARM_UP
    push, pull = exchange(parse_policy(text), shapes_of("network"), 8, 2)
    server, *workers = (rank[text] for rank in three)
    assert server["sent"] == [["send", pull.num_bytes, 2 * steps]]
    for worker in workers:
        assert worker["sent"] == [["send", push.num_bytes, steps]]
        assert worker["num_workers"] == 2


def test_an_asynchronous_server_converges_and_counts_staleness(three: Results) -> None:
    solution = torch.arange(1.0, INPUTS + 1, dtype=torch.float64)
    whole, coded = (three[0][f"{text} convex"] for text in ("ps-async", "ps-async+bf16"))
    torch.testing.assert_close(values(whole), solution, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values(coded), solution, rtol=1e-2, atol=1e-2)
    for result in (whole, coded):
        counts = dict(result["staleness"])
        assert sum(counts.values()) == 2 * CONVEX_STEPS
        assert min(counts) >= 0
        assert sum(late * count for late, count in counts.items()) > 0
        assert result["losses"][-1] < 1e-3 * result["losses"][0]


def test_without_a_counter_energy_is_unknown_with_the_reason(two: Results) -> None:
    for result in two[0].values():
        assert result["energy"] in (None, "measured")
        assert result["energy"] is not None or "unknown" in result["notes"][0]


def test_one_process_alone_trains_without_any_exchange() -> None:
    fields = {"steps": 20, "rate": 0.2}
    result = train_all({"trainings": [("alone", "convex", "all-reduce", fields)]})["alone"]
    assert result["sent"] == []
    assert result["losses"][-1] < result["losses"][0]
    assert result["num_workers"] == 1
