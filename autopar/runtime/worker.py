"""Worker process of a local launch: `python -m autopar.runtime.worker DIRECTORY` with RANK and WORLD_SIZE set."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

PARENT_POLL_S = 1.0
"""How often a worker checks that its parent lives."""
LISTENER = "AUTOPAR_LISTENER"
"""Environment variable: descriptor of the listening socket that rank 0 inherits."""


def main(directory: Path) -> int:
    """Run the job; leaves a result or an error file and says by exit code which."""
    _end_with_parent()
    rank = int(os.environ["RANK"])
    try:
        job = json.loads((directory / "job.json").read_text())
        from autopar.runtime.hosts import Meeting
        from autopar.runtime.processes import join, leave

        listener = os.environ.pop(LISTENER, None)
        membership = join(
            Meeting(**job["meeting"]), rank, int(os.environ["WORLD_SIZE"]), None if listener is None else int(listener)
        )
        if membership.meeting.num_nodes > 1 and os.environ["LOCAL_RANK"] == "0":
            print(membership.place, flush=True)
        with membership.telling():
            module, _, name = job["entry"].partition(":")
            result = getattr(importlib.import_module(module), name)(job["arguments"])
            _write(directory / f"result_{rank}.json", json.dumps(result))
            leave(membership)
    except Exception as error:  # the parent reports whatever it is and exits accordingly
        report = {
            "type": type(error).__name__,
            "message": str(error),
            "rank": getattr(error, "rank", None),
            "traceback": traceback.format_exc(),
            "failed_at": time.time(),
        }
        _write(directory / f"error_{rank}.json", json.dumps(report))
        sys.stdout.flush()
        os._exit(1)
    return 0


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _end_with_parent() -> None:
    """End this process once its parent is gone, even if that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end aborts where a thread is still inside a store or a transport of torch
