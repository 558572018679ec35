"""Options that several commands share, and the parsing of their texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from autopar.errors import InputError
from autopar.ir.pipeline import SCHEDULES
from autopar.ir.solution import OBJECTIVES, RECOMPUTE, Objective, Pins
from autopar.planner.detect import detect_gpus
from autopar.planner.plan import PlanRequest
from autopar.units import GB, GIB, KB, KIB, MB, MIB, TB, TIB

F = TypeVar("F", bound=Callable[..., Any])

BYTES_BY_SUFFIX = {
    "": 1,
    "b": 1,
    "mb": MB,
    "mib": MIB,
    "kb": KB,
    "kib": KIB,
    "gb": GB,
    "gib": GIB,
    "g": GIB,
    "tb": TB,
    "tib": TIB,
}
SECONDS_BY_SUFFIX = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there.")
set_option = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the model, e.g. layers=8. Repeatable."
)


def request_options(command: F) -> F:
    """The options that `build_request` reads."""
    options = (
        click.option(
            "--gpus", type=int, metavar="N", help="Ceiling on the number of GPUs; default: those found here, or 1."
        ),
        click.option(
            "--gpu", metavar="NAME", help="GPU to plan for (see 'autopar gpus'); default: what is found here."
        ),
        click.option("--gpus-per-node", type=int, metavar="N", help="GPUs that share the fast link."),
        click.option("--memory", metavar="SIZE", help="Usable memory of one GPU, e.g. 46GiB."),
        click.option("--objective", default="time", show_default=True, metavar="|".join(OBJECTIVES)),
        click.option("--time-weight", type=float, default=1.0, show_default=True, help="Per second, for weighted."),
        click.option("--energy-weight", type=float, default=1.0, show_default=True, help="Per joule, for weighted."),
        click.option("--batch", type=int, metavar="N", help="Global batch; default: that of example_batch()."),
        click.option(
            "--pin", "pin_text", metavar="KEY=VALUE,...", help="Fix dp, tp, pp, m, mbs, recompute, schedule, zero."
        ),
        click.option("--use-all", is_flag=True, help="Use exactly --gpus GPUs, even where fewer are better."),
        click.option(
            "--time-limit", metavar="TIME", help="Stop the search after this long, e.g. 30s; the best is kept."
        ),
        click.option("--gap", type=float, default=1e-3, show_default=True, help="Relative gap at which to stop."),
        click.option(
            "--profile",
            metavar="FILE",
            help="Measured rows to prefer to the model; 'none': no rows. Default: the store of 'autopar profile'.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def build_request(options: Mapping[str, Any]) -> PlanRequest:
    """The request that the options of `request_options` describe. Raises InputError."""
    batch = options["batch"]
    memory = options["memory"]
    limit = options["time_limit"]
    if not 0 <= options["gap"] < 1:
        raise InputError(f"--gap must be at least 0 and below 1, got {options['gap']}")
    return PlanRequest(
        num_gpus=max(1, len(detect_gpus())) if options["gpus"] is None else options["gpus"],
        gpu=options["gpu"],
        gpus_per_node=options["gpus_per_node"],
        memory_bytes=None if memory is None else parse_bytes(memory),
        objective=_objective(options),
        pins=parse_pins(options["pin_text"] or "", batch),
        profile=options["profile"],
        batch_size=batch,
        use_all=options["use_all"],
        time_limit_s=None if limit is None else parse_seconds(limit),
        gap_tolerance=options["gap"],
    )


def _objective(options: Mapping[str, Any]) -> Objective:
    kind = options["objective"]
    if kind not in OBJECTIVES:
        raise InputError(f"unknown objective {kind!r}; one of {', '.join(OBJECTIVES)}")
    if kind != "weighted":
        return Objective(kind)
    weights = (options["time_weight"], options["energy_weight"])
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise InputError("--time-weight and --energy-weight must be at least 0, and one of them above 0")
    return Objective(kind, *weights)


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


def parse_pins(text: str, batch_size: int | None = None) -> Pins:
    """`tp=2,pp=1,dp=4,m=8,recompute=full,schedule=gpipe,zero=1` to Pins.

    `mbs` (samples in one microbatch) needs the batch size. Raises InputError with the known keys.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        name = "num_microbatches" if key in ("m", "mbs") else key
        if name in found:
            raise InputError(f"--pin {key}: the same choice is fixed twice")
        found[name] = _pin_value(key, value, batch_size)
    if ("dp" in found) != ("tp" in found):
        found = {"dp": 1, "tp": 1} | found
    return Pins(**found)


def _pin_value(key: str, value: str, batch_size: int | None) -> int | str:
    choices = {"recompute": RECOMPUTE, "schedule": SCHEDULES, "zero": ("0", "1", "3")}
    if key in choices:
        if value not in choices[key]:
            raise InputError(f"--pin {key}={value}: expected one of {', '.join(choices[key])}")
        return int(value) if key == "zero" else value
    if key not in ("dp", "tp", "pp", "m", "mbs"):
        raise InputError(f"--pin {key}: unknown; known are dp, tp, pp, m, mbs, recompute, schedule, zero")
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
        raise InputError(f"--pin {key}={value}: expected a whole number of at least 1")
    return _num_microbatches(int(value), batch_size) if key == "mbs" else int(value)


def _num_microbatches(microbatch_size: int, batch_size: int | None) -> int:
    if batch_size is None:
        raise InputError("--pin mbs=... needs --batch; or fix the number of microbatches with --pin m=...")
    if batch_size % microbatch_size:
        raise InputError(
            f"--pin mbs={microbatch_size}: a batch of {batch_size} does not divide into microbatches of it"
        )
    return batch_size // microbatch_size


def parse_bytes(text: str) -> int:
    """`46GiB`, `80GB`, `1024` to bytes. Raises InputError."""
    return int(_parse_scaled(text, BYTES_BY_SUFFIX, "a size such as 46GiB or 80GB"))


def parse_seconds(text: str) -> float:
    """`30s`, `500ms`, `2min` to seconds. Raises InputError."""
    return _parse_scaled(text, SECONDS_BY_SUFFIX, "a time such as 30s or 2min")


def _parse_scaled(text: str, factors: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in factors or float(match[1]) == 0:
        raise InputError(f"{text!r} is not {expected}")
    return float(match[1]) * factors[match[2].lower()]
