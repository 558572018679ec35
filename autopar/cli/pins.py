"""Pins, as typed on the command line."""

from __future__ import annotations

import re
from typing import Any

from autopar.errors import InputError
from autopar.ir.pipeline import SCHEDULES
from autopar.ir.solution import RECOMPUTE, Pins
from autopar.report.explain import SPECIAL


def parse_pins(text: str, batch_size: int | None = None) -> Pins:
    """`tp=2,pp=1,dp=4,m=8,recompute=full,schedule=gpipe,zero=1` to Pins.

    `op:REGEX=LABEL` fixes the label of ops (the regex holds no comma), `context=off` and `experts=off` forbid labels.
    `mbs` (samples in one microbatch) needs the batch size. Raises InputError with the known keys.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.rpartition("=") if part.startswith("op:") and "=" in part else part.partition("=")
        if key.startswith("op:") or key in SPECIAL:
            _add_labels(found, key, value)
            continue
        name = "num_microbatches" if key in ("m", "mbs") else key
        if name in found:
            raise InputError(f"--pin {key}: the same choice is fixed twice")
        found[name] = _pin_value(key, value, batch_size)
    if ("dp" in found) != ("tp" in found):
        found = {"dp": 1, "tp": 1} | found
    return Pins(**found)


def _add_labels(found: dict[str, Any], key: str, value: str) -> None:
    if key in SPECIAL:
        if value != "off":
            raise InputError(f"--pin {key}={value}: expected {key}=off")
        found["without"] = tuple(sorted({*found.get("without", ()), *SPECIAL[key]}))
        return
    regex = key.removeprefix("op:")
    if not regex or not value:
        raise InputError(f"--pin {key}={value}: expected op:REGEX=LABEL, e.g. op:.*mlp.*=columns")
    found["ops"] = (*found.get("ops", ()), (regex, value))


def _pin_value(key: str, value: str, batch_size: int | None) -> int | str:
    choices = {"recompute": RECOMPUTE, "schedule": SCHEDULES, "zero": ("0", "1", "3")}
    if key in choices:
        if value not in choices[key]:
            raise InputError(f"--pin {key}={value}: expected one of {', '.join(choices[key])}")
        return int(value) if key == "zero" else value
    if key not in ("dp", "tp", "pp", "m", "mbs"):
        raise InputError(
            f"--pin {key}: unknown; known are dp, tp, pp, m, mbs, recompute, schedule, zero, context, experts, op:REGEX"
        )
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
