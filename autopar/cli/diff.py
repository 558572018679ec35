"""`autopar diff`: what two plans decide differently."""

from __future__ import annotations

import click

from autopar.cli.console import print_json
from autopar.cli.options import json_option
from autopar.ir.serialize import load_plan
from autopar.report.diff import diff_json, diff_report


@click.command()
@click.argument("first_file")
@click.argument("second_file")
@json_option
def diff(first_file: str, second_file: str, as_json: bool) -> None:
    """Compare the figures and decisions of two plan files."""
    first, second = load_plan(first_file), load_plan(second_file)
    if as_json:
        print_json(diff_json(first, second))
    else:
        click.echo(diff_report(first, second, (first_file, second_file)))
