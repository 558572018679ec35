"""`autopar unlock`: restore what runs left on GPUs that died together with their guardians."""

from __future__ import annotations

from dataclasses import asdict

import click

from autopar.cli.console import print_json
from autopar.cli.options import json_option
from autopar.planner.settings import restore_boards


@click.command()
@click.option("--force", is_flag=True, help="Also of runs in other containers, which cannot be seen from here.")
@json_option
def unlock(force: bool, as_json: bool) -> int:
    """Restore clocks and power limits that dead runs left on the GPUs of this machine.

    Runs do so themselves, also when killed; this is for those that died together with what watches them.
    """
    found = restore_boards(with_invisible=force)
    if as_json:
        print_json(asdict(found))
    else:
        for line in (*found.lines, *found.failures):
            click.echo(line)
        if not found.lines and not found.failures:
            click.echo("nothing to restore")
    return 1 if found.failures else 0
