"""Two network namespaces as two hosts: `unshare -nm python tests/dist/two_hosts.py SCENARIO PLAN [OPTION...]`.

Runs PLAN (`-`: ranks that only sum) on both, one half of the ranks on each. Once step `CUT_AT` is over the link goes
down. What then happens says the scenario: `cut`: no more; `again`: both runs end, the link comes up, and they are
started once more, to end a few steps later; `waiting`: they are to start again by themselves, and the link comes up
while they wait for each other; `killed`: in place of the link, a worker of host 1 goes. `verify` compares the plan with
the serial model instead, undisturbed. Prints what they said as JSON.
The namespaces vanish with this process. It needs root, or a user namespace (`unshare -rnm`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PORT = 29517
ADDRESSES = ("10.99.0.1", "10.99.0.2")
OTHER_ADDRESS = "10.99.0.11"
"""Of host 0 too, on the same interface."""
TIMEOUT_S = 10.0
CUT_AT = 5
MORE = 3
SLACK_S = 60.0
"""For processes to end."""
PATIENCE_S = 240.0
"""For what should take seconds, on a machine that does much else."""


def main(scenario: str, plan: str, *options: str) -> dict[str, Any]:
    make_hosts()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if scenario == "verify":
            return {"first": run_both(directory, [plan, *options], command="verify")}
        if scenario == "cut":
            return {"first": run_both(directory, [plan, *options], scenario)}
        if scenario != "again":
            return {"first": run_both(directory, [plan, "--steps", "400", *options], scenario)}
        first = run_both(directory, [plan, "--steps", "1000000", *options], "cut")
        on_host(1, "ip", "link", "set", "v1", "up")
        last = max(map(int, re.findall(r"^step (\d+)/", first["texts"][0], re.MULTILINE)))
        return {"first": first, "second": run_both(directory, [plan, "--steps", str(last + MORE), *options])}


def make_hosts() -> None:
    """Two namespaces with one link between them."""
    run("mount", "-t", "tmpfs", "none", "/run")
    for host in (0, 1):
        run("ip", "netns", "add", f"host{host}")
    run("ip", "link", "add", "v0", "netns", "host0", "type", "veth", "peer", "name", "v1", "netns", "host1")
    for host, address in enumerate(ADDRESSES):
        on_host(host, "ip", "addr", "add", f"{address}/24", "dev", f"v{host}")
        on_host(host, "ip", "link", "set", f"v{host}", "up")
        on_host(host, "ip", "link", "set", "lo", "up")
    on_host(0, "ip", "addr", "add", f"{OTHER_ADDRESS}/24", "dev", "v0")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def inside(host: int) -> list[str]:
    return ["nsenter", f"--net=/run/netns/host{host}"]


def on_host(host: int, *command: str) -> str:
    return run(*inside(host), *command)


def run_both(directory: Path, arguments: list[str], mishap: str = "", command: str = "run") -> dict[str, Any]:
    """Start the run on both hosts and wait for both.

    Args:
        directory: for what they say.
        arguments: of the command.
        command: of autopar.
        mishap: `cut`: the link, for good; `waiting`: the link, until both hosts wait; `killed`: a worker of host 1.
    """
    runs = [_start(host, directory, command, arguments) for host in (0, 1)]
    outputs = [directory / f"out_{host}" for host in (0, 1)]
    found: dict[str, Any] = {}
    try:
        if mishap:
            _wait_for(runs, outputs[0], f"step {CUT_AT}/")
            found["listening"] = on_host(0, "ss", "-Hltn").splitlines()
            found["reaches"] = {address: _reaches(address) for address in (ADDRESSES[0], OTHER_ADDRESS)}
            if mishap == "killed":
                _kill_worker()
            else:
                on_host(1, "ip", "link", "set", "v1", "down")
        cut_s = time.monotonic()
        if mishap == "waiting":
            for output in outputs:
                _wait_for(runs, output, "going on from step")
            on_host(1, "ip", "link", "set", "v1", "up")
        ended_s = [when - cut_s for when in _ended(runs)]
    finally:
        for process in runs:
            process.kill()
    codes = [process.returncode for process in runs]
    left = [line for line in run("ps", "-eo", "pid,args").splitlines() if str(directory) in line]
    return {**found, "codes": codes, "texts": [o.read_text() for o in outputs], "ended_s": ended_s, "left": left}


def _kill_worker() -> None:
    for process in map(int, run("ip", "netns", "pids", "host1").split()):
        if b"autopar.runtime.worker" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
            return


def _start(host: int, directory: Path, name: str, arguments: list[str]) -> subprocess.Popen[str]:
    limit = () if name == "verify" else ("--timeout", str(TIMEOUT_S))
    command = [sys.executable, "-m", "autopar", name, *arguments, *limit]
    if arguments[0] == "-":
        command = [sys.executable, __file__, "host", str(host)]
    else:
        command += ["--nodes", "2", "--node-rank", str(host)]
        command += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
    with (directory / f"out_{host}").open("w") as output:
        return subprocess.Popen(
            ["env", f"TMPDIR={directory}", *inside(host), *command],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait_for(runs: list[subprocess.Popen[str]], path: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while text not in path.read_text():
        if time.monotonic() > deadline or any(process.poll() is not None for process in runs):
            raise SystemExit(f"no {text!r} in {path}:\n{path.read_text()}")
        time.sleep(0.05)


def _reaches(address: str) -> bool:
    """Whether host 1 can connect to the meeting's port at an address of host 0."""
    code = f"import socket; socket.create_connection(({address!r}, {PORT}), 5).close()"
    probe = subprocess.run([*inside(1), sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    return probe.returncode == 0


def _ended(runs: list[subprocess.Popen[str]]) -> list[float]:
    """When each of them ended."""
    deadline = time.monotonic() + PATIENCE_S
    found: dict[int, float] = {}
    while len(found) < len(runs) and time.monotonic() < deadline:
        found |= {
            i: time.monotonic() for i, process in enumerate(runs) if i not in found and process.poll() is not None
        }
        time.sleep(0.05)
    return [found[i] for i in range(len(runs))]


def sum_on(host: int) -> int:
    """This host's rank of a run that sums until it fails."""
    from autopar.errors import NetworkError
    from autopar.ir.hosts import Hosts
    from autopar.runtime.launch import Job, launch_local

    hosts = Hosts(2, host, ADDRESSES[0], PORT, TIMEOUT_S)
    try:
        launch_local(
            Job("tests.dist.host_cases:sum_for_ever", {}, 2), hosts=hosts, on_line=lambda line: print(line, flush=True)
        )
    except NetworkError as error:
        print(f"autopar: {error}")
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "host":
        sys.exit(sum_on(int(sys.argv[2])))
    print(json.dumps(main(*sys.argv[1:])))
