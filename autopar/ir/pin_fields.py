"""Pins as a plan file keeps them: each that is set, by the name of its field, as JSON text."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from autopar.ir.codec import DecodeError, decode, encode, parse_json
from autopar.ir.solution import Pins

TYPED: Mapping[str, str] = MappingProxyType(
    {
        "num_microbatches": "m",
        "interleave": "vpp",
        "sequence": "sp",
        "true": "on",
        "false": "off",
        "pass_order": "switch",
        "num_passes": "passes",
        "pass_update": "fc_update",
    }
)
"""Fields and values to what one types for them."""


def pin_fields(pins: Pins) -> dict[str, str] | None:
    """Name of the field -> its value as JSON text, of those that differ from the default; None: all are free."""
    hints, free = typing.get_type_hints(Pins), Pins()
    names = [field.name for field in dataclasses.fields(Pins) if getattr(pins, field.name) != getattr(free, field.name)]
    return {name: json.dumps(encode(getattr(pins, name), hints[name], {})) for name in names} or None


def parse_pin_fields(fields: Mapping[str, str] | None) -> Pins:
    """Inverse of `pin_fields`. Raises ValueError for anything else."""
    hints, found = typing.get_type_hints(Pins), dict[str, Any]()
    for name, text in (fields or {}).items():
        if name not in hints:
            raise ValueError(f"pins have no {name!r}; known are {', '.join(hints)}")
        try:
            found[name] = decode(parse_json(text), hints[name], {}, f"pinned.{name}")
        except DecodeError as error:
            raise ValueError(str(error)) from error
    return Pins(**found)


def pin_words(fields: Mapping[str, str]) -> str:
    """`dp=4, m=8, recompute=full`, as typed after `--pin`; what cannot be typed there by its field's name."""
    words = []
    for name, text in fields.items():
        if name == "ops":
            words += [f"op:{regex}={label}" for regex, label in json.loads(text)]
        elif name == "meshes":
            words.append("meshes=" + "/".join(f"{dp}x{tp}" for dp, tp in json.loads(text)))
        elif name != "roles" or "meshes" not in fields:
            value = TYPED.get(text, text.strip('"')) if name == "sequence" else text.strip('"')
            words.append(f"{TYPED.get(name, name)}={value}")
    return ", ".join(words)
