"""Options of money and carbon, and the `Economy` that they describe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from autopar.errors import InputError
from autopar.planner.objective import Economy
from autopar.planner.tariff import HOURS, Job, Window, read_tariff

KINDS = ("cost", "carbon")
MONEY_OPTIONS = (
    click.option("--gpu-hour-price", type=float, metavar="PRICE", help="Per GPU and hour, for cost."),
    click.option("--gpu-price", type=float, metavar="PRICE", help="Of a bought GPU and its share of the host."),
    click.option("--lifetime", type=float, metavar="YEARS", help="Of a bought GPU; default 4."),
    click.option("--utilisation", type=float, metavar="SHARE", help="Hours in use, of a bought GPU; default 0.8."),
    click.option("--energy-price", type=float, metavar="PRICE", help="Per kWh in the same currency, for cost."),
    click.option("--grid-carbon", type=float, metavar="GRAMS", help="gCO2e per kWh, for carbon."),
    click.option("--embodied-carbon", type=float, metavar="GRAMS", help="gCO2e of making a GPU, per hour of use."),
    click.option("--pue", type=float, metavar="FACTOR", help="Energy of the facility over its machines'; default 1."),
    click.option("--tariff", metavar="FILE", help="Price or gCO2e of a kWh, or both, by hour of the day; CSV or JSON."),
    click.option("--steps", type=int, metavar="N", help="Steps of the job that is to start at the tariff's best hour."),
    click.option("--window", metavar="HH-HH", help="When it may start, e.g. 20:00-6:30; default: at any hour."),
)
NAMES = {
    "gpu_hour_price": "gpu_hour_price",
    "gpu_price": "gpu_price",
    "lifetime": "lifetime_years",
    "utilisation": "utilisation",
    "energy_price": "energy_price",
    "grid_carbon": "grid_carbon_g",
    "embodied_carbon": "embodied_g_per_gpu_hour",
    "pue": "pue",
}
"""Option -> field of `Economy`."""


def economy_of(options: Mapping[str, Any]) -> Economy | None:
    """What the options of `MONEY_OPTIONS` describe; None for an objective without money. Raises InputError."""
    every = (*NAMES, "tariff", "steps", "window")
    given = [name for name in every if options.get(name) is not None]
    if options["objective"] not in KINDS:
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for --objective cost or carbon")
        return None
    if options.get("gpu_price") is None and (bought := [n for n in ("lifetime", "utilisation") if n in given]):
        raise InputError(f"--{bought[0]} is of a bought GPU: give --gpu-price, too")
    tariff = read_tariff(options["tariff"]) if "tariff" in given else None
    numbers = {field: options[name] for name, field in NAMES.items() if name in given}
    return Economy(**numbers, tariff=tariff, job=_job(options))


def _job(options: Mapping[str, Any]) -> Job | None:
    steps, text = options.get("steps"), options.get("window")
    if steps is None:
        if text is not None:
            raise InputError("--window is for a job: give its --steps, too")
        return None
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    return Job(steps, Window() if text is None else parse_window(text))


def parse_window(text: str) -> Window:
    """`20-6`, `20:00-6:30`, `0-24` to hours; one that ends before it begins runs over midnight. Raises InputError."""
    match = re.fullmatch(r"([0-9]{1,2})(?::([0-9]{2}))?-([0-9]{1,2})(?::([0-9]{2}))?", text.strip())
    hours = [] if match is None else [int(match[i]) + int(match[i + 1] or 0) / 60 for i in (1, 3)]
    minutes_fit = match is not None and all(int(match[i] or 0) < 60 for i in (2, 4))
    if not minutes_fit or hours[0] >= HOURS or hours[1] > HOURS:
        raise InputError(f"--window {text}: expected hours of the day such as 20-6 or 20:00-6:30")
    length_h = hours[1] - hours[0]
    return Window(hours[0], length_h if length_h >= 0 else length_h + HOURS)
