"""Quantities with units, as typed on the command line: `46GiB`, `2.5s`, `1.2kJ`, `40kW`, `800Gbit/s`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from autopar.errors import InputError
from autopar.units import GB, GIB, KB, KIB, MB, MIB, TB, TIB

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
SECONDS_BY_SUFFIX = {"": 1.0, "s": 1.0, "us": 1e-6, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}
JOULES_BY_SUFFIX = {"": 1.0, "J": 1.0, "mJ": 1e-3, "kJ": 1e3, "MJ": 1e6, "Wh": 3600.0, "kWh": 3.6e6}
RATES_BY_SUFFIX = {
    f"{unit}{per}": factor
    for unit, factor in {
        "Gbit": GB / 8,
        "Gb": GB / 8,
        "Tbit": TB / 8,
        "Tb": TB / 8,
        "MB": MB,
        "GB": GB,
        "GiB": GIB,
    }.items()
    for per in ("/s", "ps")
} | {"Gbit": GB / 8, "Tbit": TB / 8}
WATTS_BY_SUFFIX = {"": 1.0, "W": 1.0, "kW": 1e3, "MW": 1e6}


def parse_bytes(text: str) -> int:
    """`46GiB`, `80GB`, `1024` to bytes. Raises InputError."""
    return int(_parse_scaled(text, BYTES_BY_SUFFIX, "a size such as 46GiB or 80GB"))


def parse_seconds(text: str) -> float:
    """`30s`, `500ms`, `2min` to seconds. Raises InputError."""
    return _parse_scaled(text, SECONDS_BY_SUFFIX, "a time such as 30s or 2min")


def parse_joules(text: str) -> float:
    """`1.2kJ`, `500J`, `2kWh` to joules; `m` and `M` differ. Raises InputError."""
    return _parse_scaled(text, JOULES_BY_SUFFIX, "an energy such as 1.2kJ or 500J")


def parse_watts(text: str) -> float:
    """`40kW`, `700W` to watts. Raises InputError."""
    return _parse_scaled(text, WATTS_BY_SUFFIX, "a power such as 40kW or 700W")


def parse_rate(text: str) -> float:
    """`800Gbit/s`, `1.6Tbps`, `100GB/s` to bytes per second; `b` is bits, `B` bytes. Raises InputError."""
    return _parse_scaled(text, RATES_BY_SUFFIX, "a rate such as 800Gbit/s or 100GB/s")


def _parse_scaled(text: str, factors: Mapping[str, float], expected: str) -> float:
    """Number times the factor of its suffix, which is looked up as written, then in small letters."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]*)\s*", text)
    factor = None if match is None else factors.get(match[2], factors.get(match[2].lower()))
    if match is None or factor is None or float(match[1]) == 0:
        raise InputError(f"{text!r} is not {expected}")
    return float(match[1]) * factor
