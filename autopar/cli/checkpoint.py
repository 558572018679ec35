"""`autopar checkpoint`: list checkpoints of a run, take the weights out, make one of weights."""

from __future__ import annotations

from dataclasses import asdict

import click

from autopar.cli.console import print_json
from autopar.cli.options import json_option
from autopar.ir.inference import require_training
from autopar.ir.serialize import load_plan
from autopar.planner.checkpoints import export_checkpoint, import_checkpoint, list_checkpoints
from autopar.units import format_bytes


@click.group()
def checkpoint() -> None:
    """List checkpoints of 'autopar run --checkpoint', export their weights, import weights."""


@checkpoint.command("list")
@click.argument("directory")
@json_option
def list_(directory: str, as_json: bool) -> None:
    """List the checkpoints in DIRECTORY, oldest first."""
    found = list_checkpoints(directory)
    if as_json:
        print_json({"checkpoints": [asdict(listed) for listed in found]})
        return
    for listed in found:
        if listed.fault:
            click.echo(f"step {listed.step:>8}  damaged: {listed.fault}")
        else:
            size = format_bytes(listed.size_bytes)
            click.echo(f"step {listed.step:>8}  {size:>9}  {listed.num_gpus} processes  {listed.source}")


@checkpoint.command("export")
@click.argument("directory")
@click.option("--out", required=True, metavar="FILE", help="Ends in .safetensors or .pt.")
@click.option("--step", type=int, metavar="N", help="Of the checkpoint; default: the newest.")
@json_option
def export(directory: str, *, out: str, step: int | None, as_json: bool) -> None:
    """Write the weights of a checkpoint in DIRECTORY as a plain state_dict."""
    source, count = export_checkpoint(directory, out, step)
    if as_json:
        print_json({"checkpoint": source, "file": out, "num_tensors": count})
    else:
        click.echo(f"{out}: {count} tensors of {source}")


@checkpoint.command("import")
@click.argument("files", nargs=-1, required=True)
@click.option("--plan", "plan_file", required=True, metavar="PLAN", help="Whose model the weights are of.")
@click.option("--out", required=True, metavar="DIR", help="For 'autopar run PLAN --checkpoint DIR'.")
@json_option
def import_(files: tuple[str, ...], *, plan_file: str, out: str, as_json: bool) -> None:
    """Make a checkpoint at step 0 from the state_dict in FILES (.safetensors, or .pt of tensors alone)."""
    plan = load_plan(plan_file)
    require_training(plan, "autopar checkpoint import")
    unused = import_checkpoint(files, plan, out)
    if as_json:
        print_json({"directory": out, "num_unused": unused})
    else:
        click.echo(f"{out}: ready for 'autopar run {plan_file} --checkpoint {out}'; {unused} tensors were not needed")
