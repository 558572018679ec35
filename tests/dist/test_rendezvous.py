"""Ranks meet at one address and nowhere else, in a run that is theirs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from autopar.errors import InputError, NetworkError
from autopar.ir.hosts import Hosts
from autopar.runtime.hosts import Meeting, external_meeting, listen, make_meeting, resolve
from autopar.runtime.launch import Job, launch_local
from autopar.runtime.rendezvous import Peer, call_roll, interface_of, local_address, open_store
from autopar.torch_adapter import Store

LOCAL = Hosts(join_timeout_s=2.0)
JOB = {"entry": "x:y", "arguments": {}}


def met(hosts: Hosts = LOCAL) -> tuple[Meeting, Store]:
    """A meeting and rank 0's store."""
    listener = listen(hosts)
    meeting = make_meeting(hosts, listener.getsockname()[1], JOB)
    return meeting, open_store(meeting, 0, listener.detach())


def listening() -> set[str]:
    """Addresses at which this process listens, from the kernel's table; hexadecimal as there."""
    own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]]
        found |= {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}
    return found


def test_the_store_listens_at_its_address_alone() -> None:
    before = listening()
    meeting, store = met()
    assert listening() - before <= {"0100007F"}
    assert "0100007F" in listening()
    for other in ("127.0.0.2", "127.0.0.3"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, meeting.port), 5).close()
    socket.create_connection(("127.0.0.1", meeting.port), 5).close()
    store.set("still", "there")
    assert store.get("still") == b"there"


@pytest.mark.dist
def test_every_socket_of_a_local_run_is_local() -> None:
    for addresses in launch_local(Job("tests.dist.host_cases:listening_addresses", {}, 2), timeout_s=100):
        assert addresses
        assert set(addresses) == {"0100007F"}


def test_a_rank_that_comes_a_second_time_leaves_the_old_run() -> None:
    meeting, _store = met()
    again = open_store(meeting, 1)
    assert again.check(["joined/1"])
    with pytest.raises(NetworkError, match=f"rank 1 found no run to join at 127.0.0.1:{meeting.port} within 2 s"):
        open_store(meeting, 1)


def test_nobody_at_the_address_is_told_with_the_address() -> None:
    free = socket.socket()
    free.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
    meeting = make_meeting(LOCAL, free.getsockname()[1], JOB)
    with pytest.raises(NetworkError, match=f"at 127.0.0.1:{meeting.port} within 2 s: is node 0 started"):
        open_store(meeting, 1)


def test_the_roll_names_who_is_missing() -> None:
    meeting, store = met()
    partial = replace(meeting, num_nodes=2, join_timeout_s=0.2)
    store.set("peer/2", "{}")
    with pytest.raises(NetworkError, match=r"rank 0 waited 0\.2 s .* for rank 1, 3 on node 0, 1:"):
        call_roll(store, partial, 0, 4)


@pytest.mark.parametrize("other", [JOB, {"entry": "x:y", "arguments": {"steps": 3}}])
def test_hosts_with_different_jobs_do_not_run(other: dict[str, object]) -> None:
    meeting, store = met(replace(LOCAL, join_timeout_s=20.0))
    theirs = replace(make_meeting(LOCAL, meeting.port, other), node_rank=1)
    found: dict[int, object] = {}

    def call(rank: int, own: Meeting, place: Store) -> None:
        try:
            found[rank] = call_roll(place, own, rank, 2)
        except InputError as error:
            found[rank] = str(error)

    calls = [
        threading.Thread(target=call, args=(0, meeting, store)),
        threading.Thread(target=call, args=(1, theirs, open_store(theirs, 1))),
    ]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join(60)
    if other is JOB:
        peers = found[0]
        assert peers == found[1]
        assert isinstance(peers, dict)
        assert peers[1] == Peer(1, socket.gethostname(), "127.0.0.1", meeting.fingerprint)
    else:
        assert str(found[0]).startswith("node 1 runs another plan")
        assert found[0] == found[1]


def test_the_interface_is_the_one_that_leads_to_the_meeting() -> None:
    meeting, _ = met()
    assert local_address(meeting) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") == ""
    assert interface_of("") == ""


def test_addresses_that_cannot_be_a_meeting_are_refused() -> None:
    with pytest.raises(InputError, match=r"203\.0\.113\.7 is not an address of this host, which is node 0"):
        listen(Hosts(2, 0, "203.0.113.7", 29500))
    with pytest.raises(InputError, match=r"means 127\.0\.0\.1 here, which other hosts do not reach"):
        resolve(Hosts(2, 1, "localhost", 29500))
    taken = listen(LOCAL)
    with pytest.raises(InputError, match="is taken by another process"):
        listen(replace(LOCAL, port=taken.getsockname()[1]))
    taken.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_nodes": 2, "node_rank": 2, "port": 1}, "--node-rank 2 of --nodes 2"),
        ({"num_nodes": 2, "port": 0, "address": "10.0.0.1"}, "--master-port must be between 1 and 65535"),
        ({"num_nodes": 2, "port": 1, "address": "0.0.0.0"}, "no single address"),
        ({"num_nodes": 2, "port": 1, "address": "::"}, "no single address"),
        ({"timeout_s": 0.5}, "--timeout must be at least 2 s"),
        ({"timeout_s": float("nan")}, "--timeout must be at least 2 s"),
    ],
)
def test_hosts_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Hosts(**values)  # type: ignore[arg-type]


def test_ranks_are_dealt_to_hosts_in_order() -> None:
    hosts = [Hosts(3, k, "10.0.0.1", 1) for k in range(3)]
    assert [rank for host in hosts for rank in host.local_ranks(12)] == list(range(12))
    with pytest.raises(InputError, match="8 processes do not divide into 3 hosts"):
        hosts[0].local_ranks(8)


def test_torchruns_variables_describe_the_meeting() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    meeting = external_meeting(variables, 60.0)
    assert (meeting.num_nodes, meeting.node_rank, meeting.where) == (2, 1, "10.0.0.1:7")
    assert timedelta(seconds=meeting.limit_s) < timedelta(seconds=60)
    with pytest.raises(InputError, match="launcher's variables"):
        external_meeting(variables | {"MASTER_PORT": "x"}, 60.0)


ENDS_AMID_BEATS = """
import time
from torch.distributed import TCPStore
from autopar.runtime import liveness

liveness.BEAT_S = 1e-6
store = TCPStore("127.0.0.1", 0, 1, is_master=True)
liveness.announce(store, 0)
liveness.Liveness(store, 0, 1)
time.sleep(0.05)
"""


def test_a_process_that_just_ends_does_not_abort_its_beats() -> None:
    """A loop of one's own under torchrun never says that it is over."""
    done = subprocess.run([sys.executable, "-c", ENDS_AMID_BEATS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
