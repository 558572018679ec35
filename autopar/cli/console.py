"""What commands print and how they end: stdout, progress on stderr, errors, exit codes.

Machine output (`--json`) stands alone on stdout. An error is one message: on stderr, or with `--json` as
`{"error": {"kind", "message", "exit_code"}}` on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from autopar.errors import AutoparError, InfeasibleError

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, made to unwind the stack as Ctrl-C does: nothing catches a KeyboardInterrupt by mistake."""


def exit_code(stop: BaseException | None) -> int:
    """130 for Ctrl-C, 143 for SIGTERM, as shells report them."""
    return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(content, sort_keys=True, indent=2, allow_nan=False))


def report_error(message: str, kind: str, exit_code: int, as_json: bool, details: dict[str, Any]) -> int:
    """Print the error the right way; returns the exit code."""
    if as_json:
        print_json({"error": {"kind": kind, "message": message, "exit_code": exit_code, **details}})
    else:
        click.echo(f"autopar: {message}", err=True)
    return exit_code


def error_details(error: AutoparError) -> dict[str, Any]:
    """Fields that programs want beyond kind and message."""
    if not isinstance(error, InfeasibleError):
        return {}
    remedies = [asdict(remedy) for remedy in error.remedies]
    return {"limit": error.limit, "need": error.need, "have": error.have, "remedies": remedies}


@contextmanager
def progress_line(as_json: bool) -> Iterator[Callable[[str], None] | None]:
    """A function that shows what is being done on one line of stderr; None unless that is a terminal."""
    if as_json or not sys.stderr.isatty():
        yield None
        return

    def show(phrase: str) -> None:
        sys.stderr.write(f"\r\033[K{phrase} ...")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
