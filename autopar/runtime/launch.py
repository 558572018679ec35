"""Launch: the worker processes of this host, one per rank, that live and die together; all ranks, or those of one host
of several.

The parent (which needs no torch) writes the job to a directory, starts `python -m autopar.runtime.worker` N times and
waits. If a worker fails or is killed the others are ended and `WorkerError` names the first to fail; however the
parent leaves, no worker stays behind (each also watches its parent and ends when that is gone).

Files in the directory: `job.json`; by rank `result_R.json`, `error_R.json`, `output_R.txt` and `log_R.txt`
(what it printed).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autopar import errors
from autopar.errors import AutoparError, NetworkError, WorkerError
from autopar.ir.hosts import Hosts
from autopar.runtime.hosts import listen, make_meeting
from autopar.runtime.nccl_log import nccl_message
from autopar.runtime.pulse import Pulse
from autopar.runtime.worker import LISTENER

POLL_S = 0.05
"""How often the parent looks at its workers."""
GRACE_S = 3.0
"""How long workers have to end on SIGTERM before SIGKILL."""
SETTLE_S = 0.5
"""After one failure, how long to wait for others that failed at the same time and may know the cause."""
DEVICE_LOST = re.compile(r"CUDA error|NCCL error|cuDNN error|device-side|uncorrectable", re.IGNORECASE)
"""In an error's message: the device is to blame, or may be."""
KEEP_MEMORY: Mapping[str, str] = MappingProxyType(
    {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}
)
"""Settings of glibc's allocator, where the user has none: what a step frees stays for the next one. Given back to the
system it is zeroed page by page again, which took a fifth of the step of a small GPT on a processor."""

OWN_DOING = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals that a process brings upon itself; its last words tell why."""


@dataclass(frozen=True)
class Job:
    """What workers do.

    Attributes:
        entry: `package.module:function`; called with `arguments` once `torch.distributed` is initialised; its JSON
            value is the worker's result.
        arguments: JSON object.
        num_processes: number of ranks.
        environment: variables of the workers besides this process's own.
        is_stepwise: the first rank prints a line per step, whose absence means that it hangs.
    """

    entry: str
    arguments: Mapping[str, Any]
    num_processes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    is_stepwise: bool = False


def launch_local(
    job: Job,
    *,
    hosts: Hosts | None = None,
    timeout_s: float | None = None,
    on_line: Callable[[str], None] | None = None,
) -> list[Any]:
    """Run the ranks of this host and return their results by rank.

    Args:
        job: see `Job`.
        hosts: that take part; None: this one alone.
        timeout_s: end everything after this long; None: no limit.
        on_line: called with each line that the first rank of this host prints.

    Raises:
        AutoparError: as raised by a worker, if on purpose; its message names the rank.
        NetworkError: other ranks did not come, or did not answer.
        WorkerError: a worker died, raised anything else, or the time is over.
    """
    hosts = hosts or Hosts()
    ranks = hosts.local_ranks(job.num_processes)
    with tempfile.TemporaryDirectory(prefix="autopar-") as name:
        directory = Path(name)
        workers: dict[int, subprocess.Popen[bytes]] = {}
        try:
            _start_all(job, hosts, directory, workers)
            _wait(workers, directory, timeout_s, on_line, Pulse(hosts.timeout_s) if job.is_stepwise else None)
        finally:
            _end(list(workers.values()))
        return [json.loads((directory / f"result_{rank}.json").read_text()) for rank in ranks]


def _start_all(job: Job, hosts: Hosts, directory: Path, workers: dict[int, subprocess.Popen[bytes]]) -> None:
    """Write the job and start this host's ranks; `workers` holds those that run, also after an error."""
    content = {"entry": job.entry, "arguments": dict(job.arguments)}
    ranks = hosts.local_ranks(job.num_processes)
    with contextlib.ExitStack() as until_started:
        listener = until_started.enter_context(listen(hosts)) if hosts.node_rank == 0 else None
        port = hosts.port if listener is None else listener.getsockname()[1]
        meeting = make_meeting(hosts, port, content)
        (directory / "job.json").write_text(json.dumps(content | {"meeting": asdict(meeting)}))
        for rank in ranks:
            workers[rank] = _start(job, rank, ranks, directory, listener if rank == 0 else None)


def _start(
    job: Job, rank: int, ranks: range, directory: Path, listener: socket.socket | None
) -> subprocess.Popen[bytes]:
    environment = {**KEEP_MEMORY, **os.environ, **job.environment}
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - ranks.start),
        "WORLD_SIZE": str(job.num_processes),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join([p for p in sys.path if p and os.path.isdir(p)]),
    }
    environment.pop("MASTER_ADDR", None)  # of a launcher above this one, which must not be joined
    if listener is not None:
        environment[LISTENER] = str(listener.fileno())
    with (directory / f"output_{rank}.txt").open("wb") as output, (directory / f"log_{rank}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "autopar.runtime.worker", str(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
            pass_fds=() if listener is None else (listener.fileno(),),
        )


def _wait(
    workers: Mapping[int, subprocess.Popen[bytes]],
    directory: Path,
    timeout_s: float | None,
    on_line: Callable[[str], None] | None,
    pulse: Pulse | None,
) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    shown, output = 0, directory / f"output_{min(workers)}.txt"
    listeners = [listener for listener in (on_line, None if pulse is None else pulse.hear) if listener is not None]
    while True:
        codes = {rank: worker.poll() for rank, worker in workers.items()}
        shown = _show_lines(output, shown, listeners)
        if any(code not in (None, 0) for code in codes.values()):
            time.sleep(SETTLE_S)
            raise _failure({rank: worker.poll() for rank, worker in workers.items()}, directory)
        if all(code == 0 for code in codes.values()):
            _show_lines(output, shown, listeners)
            return
        if pulse is not None and (fault := pulse.fault()):
            raise WorkerError(fault, rank=min(workers) if len(workers) == 1 else None, is_lost=True)
        if deadline is not None and time.monotonic() > deadline:
            running = ", ".join(str(rank) for rank, code in codes.items() if code is None)
            raise WorkerError(f"no result after {timeout_s:g} s; still running: ranks {running}")
        time.sleep(POLL_S)


def _show_lines(path: Path, shown: int, listeners: Sequence[Callable[[str], None]]) -> int:
    """Hand over complete lines after byte `shown`; returns how far they went."""
    if not listeners:
        return shown
    with path.open("rb") as file:
        file.seek(shown)
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]
    for line in complete.decode(errors="replace").splitlines():
        for listener in listeners:
            listener(line)
    return shown + len(complete)


def _failure(codes: Mapping[int, int | None], directory: Path) -> AutoparError:
    """The error of the rank that failed first: a killed process before the others that then lost their peer."""
    for rank, code in codes.items():
        if code is not None and code < 0:
            told_by_nccl = nccl_message((directory / f"log_{rank}.txt").read_text(errors="replace"), rank)
            if told_by_nccl is not None:
                return NetworkError(told_by_nccl)
            message = f"rank {rank} was killed by {signal.Signals(-code).name}"
            if -code in OWN_DOING:
                message += f"\n{_tail(directory, rank)}"
            return WorkerError(message, rank=rank, is_lost=True)
    found = [(rank, _read_error(directory, rank)) for rank, code in codes.items() if code]
    told = [(error["failed_at"], rank, error) for rank, error in found if error is not None]
    if not told:
        rank = found[0][0]
        message = f"rank {rank} ended with exit code {codes[rank]}\n{_tail(directory, rank)}"
        return WorkerError(message, rank=rank, is_lost=True)
    _, rank, error = min(told, key=lambda entry: entry[:2])
    deliberate = getattr(errors, error["type"], None)
    if deliberate is not None and error["type"] not in ("InfeasibleError", "WorkerError"):
        if issubclass(deliberate, WorkerError):
            return deliberate(error["message"], rank=error["rank"])  # type: ignore[no-any-return]
        return deliberate(error["message"])  # type: ignore[no-any-return]
    message = f"rank {rank} failed: {error['type']}: {error['message']}\n{error['traceback']}"
    return WorkerError(message, rank=rank, is_lost=DEVICE_LOST.search(error["message"]) is not None)


def _read_error(directory: Path, rank: int) -> dict[str, Any] | None:
    path = directory / f"error_{rank}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _tail(directory: Path, rank: int, num_lines: int = 20) -> str:
    lines = (directory / f"log_{rank}.txt").read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-num_lines:])


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End every worker that still runs, and wait until it and the processes that it started are gone."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # loader processes of a worker that was killed
