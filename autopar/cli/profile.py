"""`autopar profile`: measure the ops of a model and write the rows to a profile."""

from __future__ import annotations

import click

from autopar.cli.options import json_option, set_option


@click.command()
@click.argument("model")
@set_option
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N", help="Where to measure.")
@click.option("--out", default="profile.jsonl", show_default=True, metavar="FILE", help="Where to write the rows.")
@json_option
def profile(model: str, settings: tuple[str, ...], device: str, out: str, as_json: bool) -> None:
    """Measure the ops of MODEL at their local shapes; 'autopar plan --profile' prefers them."""
