"""The option `--report`, which several commands have."""

from __future__ import annotations

from pathlib import Path

import click

from autopar.errors import InputError
from autopar.ir.serialize import check_writable

report_option = click.option("--report", metavar="FILE", help="Write an HTML page of its own there that shows it all.")


def check_report(report: str | None, *taken: str | None) -> None:
    """Raises InputError, before long work, unless the page can be written, and to none of the other files."""
    if report is None:
        return
    check_writable(report, "--report")
    if Path(report).resolve() in {Path(other).resolve() for other in taken if other is not None}:
        raise InputError(f"--report {report}: another file of this command has that name; give another one")
