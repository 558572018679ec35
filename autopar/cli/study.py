"""`autopar study`: ways to keep replicas in step, priced and run: synchronous, asynchronous, compressed."""

from __future__ import annotations

import click

from autopar.cli.console import print_json, progress_line
from autopar.cli.options import json_option, parse_settings, set_option
from autopar.cli.quantities import parse_rate
from autopar.cli.sweep import parse_counts
from autopar.errors import InputError
from autopar.ir.serialize import check_writable
from autopar.ir.sync import parse_policy
from autopar.planner.request import PlanRequest
from autopar.planner.study import Running, study_model
from autopar.planner.sweep import CPU, num_cores
from autopar.report.figure import check_plot
from autopar.report.study import plot_study, study_json, study_report

DEFAULT_POLICIES = (
    "all-reduce,ps-sync,ps-async,local=8,all-reduce+bf16,all-reduce+fp8,all-reduce+top-k=0.01,all-reduce+power-sgd=4"
)


@click.command()
@click.argument("model")
@click.option("--workers", default="1,2,4,8", show_default=True, metavar="N,N,...", help="Numbers of workers.")
@click.option(
    "--policies",
    default=DEFAULT_POLICIES,
    show_default=True,
    metavar="P,P,...",
    help="all-reduce, ps-sync, ps-async or local=H; gradients compressed with +bf16, +fp8, +top-k=SHARE, +power-sgd=R.",
)
@click.option("--gpu", metavar="NAME", help="Device to price for; default: what is found here, with --measure: cpu.")
@click.option("--gpus-per-node", type=int, metavar="N", help="Devices that share the fast link.")
@click.option("--network", metavar="RATE", help="All network ports of a node together, e.g. 800Gbit/s.")
@click.option("--batch", type=int, metavar="N", help="Samples of a step over all workers; default: the example batch.")
@click.option("--profile", metavar="FILE", help="Measured rows to prefer to the model; 'none': no rows.")
@click.option("--measure", is_flag=True, help="Also run on local processes, with plain SGD.")
@click.option("--measure-most", type=int, metavar="N", help="Most workers to run; default: one per core, at least 2.")
@click.option("--measure-steps", default=20, show_default=True, metavar="N", help="Timed steps of each run.")
@click.option("--rate", default=0.1, show_default=True, help="Learning rate of the runs.")
@set_option
@click.option("--plot", metavar="FILE", help="Draw time and energy over the number of workers, e.g. into study.svg.")
@json_option
def study(
    model: str,
    *,
    workers: str,
    policies: str,
    gpu: str | None,
    gpus_per_node: int | None,
    network: str | None,
    batch: int | None,
    profile: str | None,
    measure: bool,
    measure_most: int | None,
    measure_steps: int,
    rate: float,
    settings: tuple[str, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """Price ways to keep replicas of MODEL in step, on every number of workers; with --measure also run them."""
    counts = parse_counts(workers, "--workers")
    chosen = tuple(dict.fromkeys(parse_policy(text) for text in policies.split(",")))
    if plot is not None:
        check_writable(plot, "--plot")
        check_plot()
    running = None
    if measure:
        if gpu not in (None, CPU):
            raise InputError(f"--measure runs on this machine's processor: leave out --gpu, or say --gpu {CPU}")
        running = Running(max(2, num_cores()) if measure_most is None else measure_most, measure_steps, rate)
    request = PlanRequest(
        num_gpus=1,
        gpu=CPU if measure else gpu,
        gpus_per_node=gpus_per_node,
        network_bytes_per_s=None if network is None else parse_rate(network),
        batch_size=batch,
        profile=profile,
    )
    with progress_line(as_json) as progress:
        found = study_model(
            model, parse_settings(settings), request, chosen, counts, running=running, progress=progress
        )
    if plot is not None:
        plot_study(found, plot)
    print_json(study_json(found)) if as_json else click.echo(study_report(found))
