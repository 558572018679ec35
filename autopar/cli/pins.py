"""Pins, as typed on the command line: `--pin dp=16,tp=8,pp=8,vpp=3,mbs=1,gbs=1536,sp=on,recompute=selective`.

Numbers mean what published tables mean by them: `mbs` is sequences per microbatch and data-parallel rank, `gbs`
sequences per step, `ga` or `m` microbatches per step, so that gbs = mbs * dp * m. Ranks of `ep` count among those of
`dp`, ranks of `cp` do not. `meshes=2x1/1x2` gives every stage a mesh of its own, dp x tp, in place of dp, tp and pp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from autopar.errors import InputError
from autopar.ir.families import CHOICES, FAMILIES
from autopar.ir.offload import PLACES
from autopar.ir.passes import ORDERS, SHARES, TURNS, UPDATES
from autopar.ir.pipeline import SCHEDULES, ZERO_BUBBLE
from autopar.ir.solution import RECOMPUTE, Pins
from autopar.report.explain import SPECIAL

COUNTS = ("dp", "tp", "pp", "vpp", "cp", "ep", "mbs", "gbs", "ga", "m", "passes")
WORDS: Mapping[str, tuple[str, ...]] = {
    "recompute": RECOMPUTE,
    "schedule": SCHEDULES,
    "zero": ("0", "1", "2", "3"),
    "dtype": CHOICES["dtype"],
    "switch": ORDERS,
    "fc_update": UPDATES,
    "offload_optimizer": PLACES,
    "offload_activations": PLACES,
}
SWITCHES = ("compile", "fused", "overlap", "fp8", "tf32")
"""Of the software; see `planner.software`."""
ONE_WEIRD_TRICK = (("conv[123]d.*", "dim0"), ("(linear|addmm|mm).*", "columns"))
SCHEMES: Mapping[str, str | None] = {"a": None, "b": TURNS, "c": SHARES}
"""Of "one weird trick" (Krizhevsky 2014), `owt=`: samples of convolutions and outputs of fully connected layers are
split over the same ranks. (a): every rank gathers the samples of all, so that the fully connected batch is theirs. (b),
(c): in passes, over one rank's samples or a share of each rank's (`ir.passes`)."""
KEYS = (*COUNTS, "meshes", "sp", *WORDS, "software", *SWITCHES, *SPECIAL, "owt", "op:REGEX")
PASS_KEYS = {"passes": "num_passes", "fc_update": "pass_update"}
_TRUTH = {"on": True, "off": False}


@dataclass(frozen=True)
class Pinned:
    """What `--pin` fixes.

    Attributes:
        batch_size: of `gbs` or of `mbs * dp * m`, else that of `--batch`.
        software: name of a stack.
        switches: facts of the software, by name in SWITCHES.
        dtype: of a built-in model.
    """

    pins: Pins
    batch_size: int | None = None
    software: str = "autopar"
    switches: Mapping[str, bool] = field(default_factory=dict)
    dtype: str | None = None


def parse_pins(text: str, batch_size: int | None = None) -> Pinned:
    """Pins in words; see the module docstring.

    `op:REGEX=LABEL` fixes the label of ops (the regex holds no comma), `context=off` and `experts=off` forbid labels.

    Args:
        batch_size: that of `--batch`.

    Raises:
        InputError: an unknown key (names all), a bad value, or two entries that contradict one another.
    """
    found: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.rpartition("=") if part.startswith("op:") and "=" in part else part.partition("=")
        if key.startswith("op:") or key == "owt" or key in SPECIAL:
            _add_labels(labels, key, value)
        elif key in found:
            raise InputError(f"--pin {key}: the same choice is fixed twice")
        else:
            found[key] = _value(key, value)
    if found.get("compile") and found.get("fused"):
        raise InputError("--pin compile=on,fused=on: kernels are fused by a compiler or by hand, give one of them")
    _passes(found, labels)
    batch_size = _batch_size(found, batch_size)
    return Pinned(
        Pins(**_degrees(found), **_rest(found), **labels, num_microbatches=_num_microbatches(found, batch_size)),
        batch_size,
        found.get("software", "autopar"),
        {name: found[name] for name in SWITCHES if name in found},
        found.get("dtype"),
    )


def pinned_options(model: str, settings: Mapping[str, str], pinned: Pinned) -> dict[str, str]:
    """Options of the model with a pinned dtype added.

    Raises:
        InputError: the model is not built in, or `--set` says another dtype.
    """
    if pinned.dtype is None:
        return dict(settings)
    if model not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise InputError(f"--pin dtype={pinned.dtype}: for the built-in models {known}; {model} chooses its own dtype")
    if settings.get("dtype", pinned.dtype) != pinned.dtype:
        raise InputError(f"--pin dtype={pinned.dtype} and --set dtype={settings['dtype']} contradict one another")
    return {**settings, "dtype": pinned.dtype}


def _add_labels(labels: dict[str, Any], key: str, value: str) -> None:
    if key in SPECIAL:
        if value != "off":
            raise InputError(f"--pin {key}={value}: expected {key}=off")
        labels["without"] = tuple(sorted({*labels.get("without", ()), *SPECIAL[key]}))
        return
    if key == "owt":
        if value not in SCHEMES:
            raise InputError(f"--pin owt={value}: expected one of {', '.join(SCHEMES)}")
        labels["ops"] = (*labels.get("ops", ()), *ONE_WEIRD_TRICK)
        if SCHEMES[value] is not None:
            labels["pass_order"] = SCHEMES[value]
        return
    regex = key.removeprefix("op:")
    if not regex or not value:
        raise InputError(f"--pin {key}={value}: expected op:REGEX=LABEL, e.g. op:.*mlp.*=columns")
    labels["ops"] = (*labels.get("ops", ()), (regex, value))


def _passes(found: Mapping[str, Any], labels: dict[str, Any]) -> None:
    """Adds what `switch`, `passes` and `fc_update` say to what `owt` says."""
    order = found.get("switch", labels.get("pass_order"))
    if "switch" in found and labels.get("pass_order", order) != order:
        raise InputError(f"--pin owt and switch={order} contradict one another: give one of them")
    asked = {name: found[key] for key, name in PASS_KEYS.items() if key in found}
    if asked and order is None:
        key = next(key for key in PASS_KEYS if key in found)
        raise InputError(f"--pin {key}={found[key]}: of passes behind a switch; add owt=b, owt=c or switch={SHARES}")
    labels |= asked | ({} if order is None else {"pass_order": order})


def _value(key: str, value: str) -> int | str | bool | tuple[tuple[int, int], ...]:
    if key == "meshes":
        return _meshes(value)
    if key in COUNTS:
        if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
            raise InputError(f"--pin {key}={value}: expected a whole number of at least 1")
        return int(value)
    if key in WORDS:
        if value not in WORDS[key]:
            raise InputError(f"--pin {key}={value}: expected one of {', '.join(WORDS[key])}")
        return int(value) if key == "zero" else value
    if key == "sp" or key in SWITCHES:
        if value not in _TRUTH:
            raise InputError(f"--pin {key}={value}: expected {key}=on or {key}=off")
        return _TRUTH[value]
    if key != "software":
        close = get_close_matches(key, KEYS, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"--pin {key}: unknown{hint}; known are {', '.join(KEYS)}")
    return value


def _meshes(value: str) -> tuple[tuple[int, int], ...]:
    """`2x1/1x2`: dp x tp of every stage."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}(/[1-9][0-9]{0,5}x[1-9][0-9]{0,5})+", value):
        raise InputError(f"--pin meshes={value}: expected dp x tp of at least two stages, e.g. meshes=2x1/1x2")
    dp_tp = [part.split("x") for part in value.split("/")]
    return tuple((int(dp), int(tp)) for dp, tp in dp_tp)


def _of_meshes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Pins of stages with meshes of their own.

    Raises:
        InputError: something else that is fixed says what all stages are like.
    """
    count, wrong = len(found["meshes"]), {"dp", "tp", "cp", "ep", "mbs"} & set(found)
    if wrong:
        raise InputError(f"--pin meshes=...,{sorted(wrong)[0]}=...: what all stages have alike, meshes says per stage")
    for key in ("vpp", "offload_optimizer", "offload_activations"):
        if key in found:
            raise InputError(f"--pin meshes=...,{key}=...: not both; stages of one mesh can have {key}")
    if found.get("schedule") == ZERO_BUBBLE:
        raise InputError("--pin meshes=...,schedule=zero-bubble: not both; stages of one mesh can have that schedule")
    if found.get("pp", count) != count:
        raise InputError(f"--pin pp={found['pp']}: meshes names {count} stages")
    return {"meshes": found["meshes"], "roles": True}


def _degrees(found: Mapping[str, Any]) -> dict[str, Any]:
    """Axes of the mesh: if one is given, dp and tp are too (1); a context or experts axis of 1 is none."""
    if "meshes" in found:
        return _of_meshes(found)
    degrees = {name: found[name] for name in ("dp", "tp", "cp", "ep") if name in found}
    if not degrees:
        if "sp" in found:
            raise InputError("--pin sp=... says how the ranks of tp share a sequence: fix tp too")
        return {}
    dp, ep = degrees.get("dp", 1), degrees.get("ep", 1)
    if dp % ep:
        raise InputError(f"--pin ep={ep}: experts are spread over ranks of dp, and dp={dp} does not divide by it")
    return {"dp": 1, "tp": 1} | {n: size for n, size in degrees.items() if size > 1 or n in ("dp", "tp")}


def _rest(found: Mapping[str, Any]) -> dict[str, Any]:
    same = ("pp", "recompute", "schedule", "zero", "offload_optimizer", "offload_activations")
    names = {"vpp": "interleave", "sp": "sequence"} | {name: name for name in same}
    return {name: found[key] for key, name in names.items() if key in found}


def _microbatches(found: Mapping[str, Any]) -> int | None:
    """Those of `m` and `ga`, which mean the same."""
    given = {found[name] for name in ("m", "ga") if name in found}
    if len(given) > 1:
        raise InputError(f"--pin m={found['m']},ga={found['ga']}: both count the microbatches of a step")
    return next(iter(given), None)


def _batch_size(found: Mapping[str, Any], batch_size: int | None) -> int | None:
    """Samples of a step, if anything says so."""
    count, whole = _microbatches(found), found.get("gbs", batch_size)
    if batch_size is not None and whole != batch_size:
        raise InputError(f"--pin gbs={whole} and --batch {batch_size} contradict one another")
    if "mbs" not in found:
        return batch_size if whole is None else int(whole)
    if not {"dp", "tp", "cp", "ep"} & set(found):
        raise InputError("--pin mbs=... counts samples per data-parallel rank: fix dp too, or give m=...")
    if whole is None and count is None:
        raise InputError("--pin mbs=... needs gbs=... or --batch; or fix the number of microbatches with m=...")
    return _samples(found) * (count or 1) if whole is None else int(whole)


def _samples(found: Mapping[str, Any]) -> int:
    """Samples of one microbatch over all data-parallel ranks."""
    return int(found["mbs"] * found.get("dp", 1))


def _num_microbatches(found: Mapping[str, Any], batch_size: int | None) -> int | None:
    count = _microbatches(found)
    if "mbs" not in found or batch_size is None:
        return count
    samples, words = _samples(found), f"mbs={found['mbs']} on dp={found.get('dp', 1)}"
    if batch_size % samples:
        raise InputError(f"--pin {words}: a batch of {batch_size} does not divide into microbatches of {samples}")
    if count not in (None, batch_size // samples):
        raise InputError(
            f"--pin {words}: a batch of {batch_size} has {batch_size // samples} microbatches of {samples}, not {count}"
        )
    return batch_size // samples
