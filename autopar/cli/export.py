"""`autopar export`: job files that start a plan on the hosts of a scheduler."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from autopar.cli.console import print_json
from autopar.cli.options import json_option, with_options
from autopar.cli.quantities import parse_seconds
from autopar.errors import InputError
from autopar.ir.hosts import DEFAULT_PORT, DEFAULT_TIMEOUT_S
from autopar.ir.inference import require_training
from autopar.ir.serialize import check_writable, load_plan
from autopar.planner.export import SCHEDULERS, ExportRequest, export_plan

RUN = (
    click.option("--nodes", default=0, metavar="K", help="Hosts; default: as many as the plan's GPUs fill."),
    click.option("--steps", default=10, show_default=True, metavar="N", help="Optimizer steps, in all."),
    click.option("--timeout", "timeout_s", default=DEFAULT_TIMEOUT_S, show_default=True, metavar="SECONDS"),
    click.option("--master-port", "port", default=DEFAULT_PORT, show_default=True, metavar="PORT"),
    click.option("--checkpoint", "checkpoints", default="", metavar="DIR", help="On storage that all hosts share."),
    click.option("--checkpoint-every", "every", default=0, metavar="N", help="Steps between; default: at the end."),
)
JOB = (
    click.option("--name", default="", metavar="NAME", help="Of the job; default: of the plan file."),
    click.option("--time", "limit", metavar="TIME", help="Limit of the job, e.g. 12h."),
    click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="E.g. NCCL_IB_HCA=mlx5; repeatable."),
    click.option("--partition", default="", metavar="NAME", help="Of Slurm."),
    click.option("--account", default="", metavar="NAME", help="Of Slurm."),
    click.option("--image", default="", metavar="IMAGE", help="Of Kubernetes: with autopar and the model's files."),
    click.option("--directory", default="/workspace", show_default=True, help="In the image, where the files are."),
    click.option("--claim", default="", metavar="NAME", help="Of Kubernetes: a volume for checkpoints."),
)


@click.command()
@click.argument("plan_file")
@click.option("--to", "scheduler", type=click.Choice(SCHEDULERS), required=True)
@with_options(*RUN, *JOB)
@click.option("--out", default=".", show_default=True, metavar="DIR", help="Write the job file there.")
@json_option
def export(
    plan_file: str, *, out: str, variables: tuple[str, ...], limit: str | None, as_json: bool, **answers: Any
) -> None:
    """Write the job file that runs PLAN_FILE on a cluster's hosts."""
    plan = load_plan(plan_file)
    require_training(plan, "autopar export")
    time_s = None if limit is None else round(parse_seconds(limit))
    request = ExportRequest(**answers, time_s=time_s, environment=_environment(variables))
    found = export_plan(plan, Path(plan_file).read_text(), plan_file, request)
    path = Path(out) / found.name
    check_writable(str(path))
    path.write_text(found.text)
    submit = f"{'sbatch' if request.scheduler == 'slurm' else 'kubectl apply -f'} {shlex.quote(str(path))}"
    if as_json:
        print_json({"file": str(path), "submit": submit})
    else:
        click.echo(f"Saved       {path}\nNext        {submit}")


def _environment(variables: tuple[str, ...]) -> dict[str, str]:
    pairs = [variable.partition("=") for variable in variables]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise InputError(f"--env {wrong[0]}: give NAME=VALUE")
    return {name: value for name, _, value in pairs}
