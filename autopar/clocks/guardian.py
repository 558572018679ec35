"""Guardian: a process that outlives a run and restores its boards if the run ends without having done so.

`python -m autopar.clocks.guardian STATE_FILE`. Its standard input is a pipe from the run: when that closes, the run is
gone, by whatever death. If the state file is then still there, the run has not restored. It prints `ready` once NVML is
open; the run sets nothing before. It is in a session of its own, so that Ctrl-C in a terminal does not reach it. Told
to end (SIGTERM, SIGHUP) it restores first.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from autopar.clocks.restore import restore
from autopar.clocks.state import locked, read_state
from autopar.errors import AutoparError
from autopar.nvml import NvmlError, open_nvml

READY = b"ready\n"
START_S = 120.0
"""How long a guardian may take to be ready: NVML starts the driver where nobody uses it."""
TRIES, PAUSE_S = 5, 1.0
"""A board that is busy resetting may refuse at first."""


class Stopped(Exception):  # noqa: N818 - no error
    """A signal that asks to end."""


def main(path: Path) -> int:
    """Wait for the end of the run; 0 if nothing is left to restore."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        with open_nvml() as nvml:
            try:
                os.write(1, READY)
                _wait_for_end()
            except (Stopped, BrokenPipeError):
                pass
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            for _ in range(TRIES):
                with locked(path.parent):  # or a next run could set what this one then undoes
                    if not path.exists() or not restore(read_state(path), nvml).failures:
                        return 0
                time.sleep(PAUSE_S)
    except (NvmlError, AutoparError):
        return 1
    return 1


def _wait_for_end() -> None:
    while os.read(0, 1024):
        pass


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped


def start_guardian(path: Path) -> subprocess.Popen[bytes] | None:
    """A guardian that is ready, or None if it did not come up. Closing its `stdin` tells it that the run is over."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([entry for entry in sys.path if entry and Path(entry).is_dir()])
    process = subprocess.Popen(
        [sys.executable, "-m", "autopar.clocks.guardian", str(path)],
        env=environment,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    answer = b""
    if process.stdout is not None and select.select([process.stdout], [], [], START_S)[0]:
        answer = process.stdout.readline()
    if answer == READY:
        return process
    process.kill()
    end_guardian(process)
    return None


def end_guardian(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe and wait for the end, which is soon where there is nothing to restore."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
