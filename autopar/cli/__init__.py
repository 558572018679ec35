"""Command line: `autopar plan|estimate|frontier|run|verify|explain|diff|gpus|profile`. `main` is the entry point.

An interrupt or SIGTERM at any moment, even while modules load, unwinds the stack: workers are ended, temporary files
removed.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from autopar.cli.console import Terminated, exit_code

__all__ = ["main"]


def main() -> None:
    """Entry point of the `autopar` script."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from autopar.cli.app import invoke

        sys.exit(invoke(sys.argv[1:]))
    except KeyboardInterrupt as stop:
        sys.exit(exit_code(stop))


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
