"""Named software stacks, from `costmodels/software.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from autopar.errors import InputError
from autopar.ir.software import Software
from autopar.resources import data_directory


def load_software(name: str) -> Software:
    """The facts of a stack.

    Raises:
        InputError: for an unknown name; lists the known ones.
    """
    stacks = software_stacks()
    if name not in stacks:
        close = get_close_matches(name.lower(), stacks, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown software {name!r}{hint}; known: {', '.join(sorted(stacks))}")
    return Software(name=name, **stacks[name]["facts"])


def model_options(name: str, family: str) -> dict[str, str]:
    """Options of a built-in family that hold for all models of a known stack; `pad_vocab_to` is per tensor rank."""
    return dict(software_stacks()[name].get("model", {}).get(family, {}))


def software_stacks() -> Mapping[str, Mapping[str, Any]]:
    """`title`, `source`, `facts` and, where models differ by stack, `model` options by family, of every stack."""
    path = data_directory("costmodels") / "software.json"
    stacks: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["stacks"]
    return stacks
