"""Options that several commands share, and the parsing of their texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from autopar.cli.money import MONEY_OPTIONS, economy_of
from autopar.cli.pins import parse_pins, pinned_options
from autopar.cli.quantities import parse_bytes, parse_joules, parse_rate, parse_seconds, parse_watts
from autopar.errors import InputError
from autopar.ir.cluster import ClusterDescription
from autopar.ir.inference import MODES, TRAINING, source_options
from autopar.ir.software import PRECISIONS
from autopar.ir.solution import OBJECTIVES, Limits, Objective
from autopar.planner.cluster_file import read_cluster
from autopar.planner.detect import detect_gpus
from autopar.planner.objective import Economy, objective_of
from autopar.planner.request import PlanRequest
from autopar.planner.software import chosen_software

F = TypeVar("F", bound=Callable[..., Any])
N = TypeVar("N", int, float)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there.")
cache_option = click.option(
    "--no-cache", "use_cache", is_flag=True, default=True, flag_value=False, help="Neither use nor keep cached results."
)
set_option = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the model, e.g. layers=8. Repeatable."
)


COUNT_OPTIONS = (
    click.option(
        "--gpus", type=int, metavar="N", help="Ceiling on the number of GPUs; default: those found here, or 1."
    ),
    click.option(
        "--cluster",
        metavar="FILE",
        help="Groups of several types of GPU, in place of --gpu and what goes with it, and of --gpus.",
    ),
    click.option("--use-all", is_flag=True, help="Use exactly --gpus GPUs, even where fewer are better."),
)
SPACE_OPTIONS = (
    click.option(
        "--mode",
        default=TRAINING,
        show_default=True,
        metavar="|".join(MODES),
        help="Whether steps train, or run the model forward alone.",
    ),
    click.option("--gpu", metavar="NAME", help="GPU to plan for (see 'autopar gpus'); default: what is found here."),
    click.option("--gpus-per-node", type=int, metavar="N", help="GPUs that share the fast link."),
    click.option("--memory", metavar="SIZE", help="Usable memory of one GPU, e.g. 46GiB."),
    click.option("--network", metavar="RATE", help="All network ports of a node together, e.g. 800Gbit/s or 100GB/s."),
    click.option("--gpu-power-limit", metavar="POWER", help="Power limit set on every GPU, e.g. 250W."),
    click.option("--batch", type=int, metavar="N", help="Global batch; default: that of example_batch()."),
    click.option(
        "--pin",
        "pin_text",
        metavar="KEY=VALUE,...",
        help="Fix parts of the plan and of the software, e.g. dp=2,tp=4,mbs=1,sp=on; an unknown KEY lists all.",
    ),
    click.option(
        "--precision",
        metavar="|".join(PRECISIONS),
        help="Compute in 16 bits; loss, gradients and a copy for the optimizer in 32. Default: the model's own.",
    ),
    click.option(
        "--clocks",
        default="auto",
        show_default=True,
        metavar="auto|max",
        help="Whether the plan may lock GPU clocks (needs an administrator), or leaves them alone.",
    ),
    click.option("--time-limit", metavar="TIME", help="Stop the search after this long, e.g. 30s; the best is kept."),
    click.option(
        "--profile",
        metavar="FILE",
        help="Measured rows to prefer to the model; 'none': no rows. Default: the store of 'autopar profile'.",
    ),
)
OBJECTIVE_OPTIONS = (
    click.option("--objective", default="time", show_default=True, metavar="|".join(OBJECTIVES)),
    click.option("--time-weight", type=float, metavar="W", help="Per second, for weighted; default 1."),
    click.option("--energy-weight", type=float, metavar="W", help="Per joule, for weighted; default 1."),
    *MONEY_OPTIONS,
    click.option("--gap", type=float, default=1e-3, show_default=True, help="Relative gap at which to stop."),
)
LIMIT_OPTIONS = (
    click.option("--deadline", metavar="TIME", help="Longest step allowed, e.g. 2.5s."),
    click.option("--energy-budget", metavar="ENERGY", help="Most energy a step may take, e.g. 1.2kJ."),
    click.option("--power-cap", metavar="POWER", help="Most average power, e.g. 40kW; steps are paced to keep it."),
    click.option("--peak-power", metavar="POWER", help="Most power at any moment, e.g. 50kW."),
)


def request_options(command: F) -> F:
    """The options that `build_request` reads."""
    return with_options(*COUNT_OPTIONS, *SPACE_OPTIONS, *OBJECTIVE_OPTIONS, *LIMIT_OPTIONS)(command)


def sweep_options(command: F) -> F:
    """Those of `build_request`, without the number of GPUs and what would set it."""
    return with_options(*SPACE_OPTIONS, *OBJECTIVE_OPTIONS, *LIMIT_OPTIONS)(command)


def frontier_options(command: F) -> F:
    """Those of `build_request` that say nothing about the objective."""
    return with_options(*COUNT_OPTIONS, *SPACE_OPTIONS, *LIMIT_OPTIONS)(command)


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """A decorator that adds options in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def build_request(options: Mapping[str, Any]) -> PlanRequest:
    """The request that the options of `request_options` describe. Raises InputError."""
    batch, gap = options["batch"], options.get("gap", 1e-3)
    if not 0 <= gap < 1:
        raise InputError(f"--gap must be at least 0 and below 1, got {gap}")
    cluster = None if options["cluster"] is None else _cluster(options)
    num_gpus = options["gpus"] if cluster is None else cluster.num_gpus
    pinned = parse_pins(options["pin_text"] or "", batch)
    economy = economy_of(options) if "objective" in options else None
    return PlanRequest(
        num_gpus=max(1, len(detect_gpus())) if num_gpus is None else num_gpus,
        cluster=cluster,
        gpu=options["gpu"],
        gpus_per_node=options["gpus_per_node"],
        memory_bytes=_quantity(options, "memory", parse_bytes),
        network_bytes_per_s=_quantity(options, "network", parse_rate),
        gpu_power_limit_w=_quantity(options, "gpu_power_limit", parse_watts),
        objective=_objective(options, economy) if "objective" in options else Objective("energy"),
        limits=limits_of(options),
        pins=pinned.pins,
        profile=options["profile"],
        batch_size=pinned.batch_size,
        software=chosen_software(pinned.software, pinned.switches, options["precision"]),
        use_all=options["use_all"],
        clocks=options["clocks"],
        time_limit_s=_quantity(options, "time_limit", parse_seconds),
        gap_tolerance=gap,
        economy=economy,
    )


def _cluster(options: Mapping[str, Any]) -> ClusterDescription:
    settings = ("gpus", "gpu", "gpus_per_node", "memory", "network", "gpu_power_limit")
    given = [name for name in settings if options[name] is not None]
    if given:
        raise InputError(f"--cluster says what --{given[0].replace('_', '-')} would: give one of them")
    return read_cluster(options["cluster"], parse_bytes)


def limits_of(options: Mapping[str, Any]) -> Limits:
    """What the options of `LIMIT_OPTIONS` allow. Raises InputError."""
    return Limits(
        deadline_s=_quantity(options, "deadline", parse_seconds),
        energy_j=_quantity(options, "energy_budget", parse_joules),
        average_power_w=_quantity(options, "power_cap", parse_watts),
        peak_power_w=_quantity(options, "peak_power", parse_watts),
    )


def _quantity(options: Mapping[str, Any], name: str, parse: Callable[[str], N]) -> N | None:
    """The option as a number, None if it is not given; an error names the flag."""
    text = options[name]
    if text is None:
        return None
    try:
        return parse(text)
    except InputError as error:
        raise InputError(f"--{name.replace('_', '-')}: {error}") from error


def _objective(options: Mapping[str, Any], economy: Economy | None) -> Objective:
    kind = options["objective"]
    if kind not in OBJECTIVES:
        raise InputError(f"unknown objective {kind!r}; one of {', '.join(OBJECTIVES)}")
    given = [name for name in ("time_weight", "energy_weight") if options.get(name) is not None]
    if given and kind != "weighted":
        raise InputError(f"--{given[0].replace('_', '-')} is for --objective weighted")
    if economy is not None:
        return objective_of(kind, economy)
    if kind != "weighted":
        return Objective(kind)
    weights = tuple(options[name] if name in given else 1.0 for name in ("time_weight", "energy_weight"))
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise InputError("--time-weight and --energy-weight must be at least 0, and one of them above 0")
    return Objective(kind, *weights)


def model_settings(model: str, settings: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, str]:
    """Options of the model: those of `--set`, what `--pin` says of it, and `--precision`. Raises InputError."""
    found = pinned_options(model, parse_settings(settings), parse_pins(options["pin_text"] or "", options["batch"]))
    precision = options["precision"]
    if precision not in (None, *PRECISIONS):
        raise InputError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    return {**found, **source_options(options["mode"], precision)}


def parse_settings(settings: tuple[str, ...]) -> dict[str, str]:
    """`("layers=8",)` to a mapping. Raises InputError for an entry without `=` or a repeated key."""
    found: dict[str, str] = {}
    for entry in settings:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise InputError(f"--set {entry}: expected KEY=VALUE, e.g. --set layers=8")
        if key in found:
            raise InputError(f"--set {key} is given twice: {found[key]!r} and {value!r}")
        found[key] = value
    return found
