"""A collective that does not end is one message: who waited, in which collective, for whom, and why."""

from __future__ import annotations

import re

import pytest

from autopar.errors import NetworkError, WorkerError
from autopar.ir.hosts import Hosts
from autopar.runtime.failures import (
    EndedError,
    is_cut,
    is_network_failure,
    missing_ranks,
    raise_ended,
    waiting_message,
)
from autopar.runtime.hosts import Meeting
from autopar.runtime.launch import Job, launch_local
from autopar.runtime.liveness import Sight
from autopar.runtime.nccl_log import nccl_message
from autopar.runtime.rendezvous import Peer

MEETING = Meeting(2, 0, "10.0.0.1", 29500, 60.0, 600.0, "")
PEERS = {rank: Peer(rank // 2, f"host{rank // 2}", f"10.0.0.{rank // 2 + 1}", "") for rank in range(4)}
TIMED_OUT = "[unbound_buffer.cc:78] Timed out waiting 57000ms for recv operation to complete"
CLOSED = (
    "[pair.cc:553] Connection closed by peer [10.0.0.2]:1769. This is typically caused by a remote worker crashing."
)


def told(text: str, sight: Sight) -> str:
    return waiting_message(RuntimeError(text), sight, rank=0, meeting=MEETING, peers=PEERS)


def test_a_silent_host_is_named_with_its_ranks_and_address() -> None:
    message = told(TIMED_OUT, Sight({2: 20.0, 3: 19.0}, {1: ""}, None))
    assert message.startswith("rank 0 waited 57 s in ")
    assert "rank 2, 3 on node 1 (10.0.0.2) silent for 20 s; the process, its host or the link is down" in message
    assert "ping 10.0.0.2" in message


def test_a_silent_store_is_its_host() -> None:
    sight = Sight({}, {}, 20.0)
    message = waiting_message(RuntimeError(TIMED_OUT), sight, rank=3, meeting=MEETING, peers=PEERS)
    assert "rank 0 on node 0 (10.0.0.1), where the run meets, silent for 20 s" in message


def test_a_reason_is_told_before_its_effects() -> None:
    message = told(CLOSED, Sight({3: 20.0}, {2: "ValueError: a broken shard", 1: ""}, None))
    assert message.startswith("rank 0 lost a connection in ")
    assert message.endswith("rank 2 on node 1 (10.0.0.2) failed: ValueError: a broken shard")


def test_who_lives_and_does_not_come_is_hung() -> None:
    message = told(TIMED_OUT, Sight({}, {1: "", 3: ""}, None))
    assert "rank 2 on node 1 (10.0.0.2) lives but did not come to it" in message


def test_who_is_ended_by_a_launcher_tells_whom_it_missed() -> None:
    try:
        raise_ended(15, None)
    except EndedError as error:
        ended = error
    gone = Sight({3: 2.0}, {1: "", 2: ""}, None)
    message = waiting_message(ended, gone, rank=0, meeting=MEETING, peers=PEERS)
    assert message.startswith("rank 0 was ended in its own work (test_who_is_ended")
    assert "rank 3 on node 1 (10.0.0.2) silent for 2 s" in message
    assert missing_ranks(ended, gone, 0, PEERS) == [3]
    assert not missing_ranks(ended, Sight({}, {1: ""}, None), 0, PEERS)  # whoever is ended too has not failed
    assert missing_ranks(RuntimeError(TIMED_OUT), Sight({}, {1: ""}, None), 0, PEERS) == [2, 3]


def test_nobody_to_blame_is_said_too() -> None:
    assert "disagree on what comes next" in told(TIMED_OUT, Sight({}, {1: "", 2: "", 3: ""}, None))
    assert "something between the hosts broke the connection" in told(CLOSED, Sight({}, {}, None))


@pytest.mark.parametrize(
    ("text", "network", "cut"),
    [
        (TIMED_OUT, True, False),
        ("Application timeout caused pair closure", True, False),
        (CLOSED, True, True),
        ("Connection reset by peer", True, True),
        ("[/gloo/transport/tcp/pair.cc:598] Read error [10.0.0.2]:4000: No route to host", True, True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False, False),
        ("CUDA error: out of memory", False, False),
    ],
)
def test_failures_of_the_network_are_told_from_others(text: str, network: bool, cut: bool) -> None:
    assert is_network_failure(RuntimeError(text)) is network
    assert is_cut(RuntimeError(text)) is cut
    assert not is_network_failure(ValueError(text))


def test_nccls_watchdog_is_read_from_the_log() -> None:
    line = (
        "[rank1]:[E1206 18:44:13.275 ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=7753, OpType=_REDUCE_SCATTER_BASE, NumelIn=544997376, NumelOut=68124672, Timeout(ms)=600000) "
        "ran for 600089 milliseconds before timing out."
    )
    message = nccl_message(f"Loading\n{line}\n{line.replace('_REDUCE_SCATTER_BASE', 'ALLREDUCE')}\n", 1)
    assert message is not None
    assert message.startswith("rank 1 waited 600 s in reduce_scatter (NCCL): ")
    older = "WorkNCCL(SeqNum=1, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1802212 milliseconds before timing out"
    assert "rank 0 waited 1802 s in all_reduce (NCCL)" in str(nccl_message(older, 0))
    assert nccl_message("all is well, OpType=ALLREDUCE", 0) is None


def run_and_fail(instead: str, wait: str, timeout_s: float, num_processes: int = 2) -> WorkerError:
    job = Job("tests.dist.host_cases:wait_for_one", {"instead": instead, "wait": wait}, num_processes)
    with pytest.raises(WorkerError) as caught:
        launch_local(job, hosts=Hosts(timeout_s=timeout_s), timeout_s=200)
    return caught.value


WAITED = r"rank 0 waited 5 s in {} \(wait_for_one in host_cases\.py\): rank 1 on node 0 \(127\.0\.0\.1\) "


@pytest.mark.dist
@pytest.mark.parametrize(
    ("instead", "wait", "why"),
    [
        pytest.param("sleep", "all_reduce", "lives but did not come to it", marks=pytest.mark.slow),  # as in test_hung
        ("stop", "recv", r"silent for \d+ s; the process is stopped"),
    ],
)
def test_a_hung_and_a_stopped_rank_are_told_apart(instead: str, wait: str, why: str) -> None:
    error = run_and_fail(instead, wait, timeout_s=8.0)
    assert isinstance(error, NetworkError)
    assert re.match(WAITED.format(wait) + why, str(error))
    assert "\n" not in str(error)
