"""Plan files: `Plan` to strict, versioned, deterministic JSON and back, and their atomic writing.

Placements are text (`S0,I`: one per mesh axis), and each op's strategy is one line:

    "linear_3": "batch,columns: S0,I; R,S0 -> S0,S1"

i.e. the label of each axis, the placements of each input, then of each output. A label ending in `!` splits no
work although its name suggests it, or the reverse. A parameter is `label storage/exposed/optimizer` per axis:
`zero1 I/R/S0`.
Equal plans give equal bytes; only `created` and `solver.wall_s` differ between equal runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.codec import DecodeError, TextForm, decode, encode, format_json, parse_json
from autopar.ir.mesh import MeshAxis, StageMesh
from autopar.ir.placement import Sharding, format_sharding, parse_placement, parse_sharding
from autopar.ir.plan import SCHEMA_VERSION, Plan, Prediction
from autopar.ir.quantity import Quantity
from autopar.ir.strategy import (
    PARAMETER_LABELS,
    AxisStrategy,
    ParameterAxisStrategy,
    ParameterStrategy,
    Strategy,
    input_sharding,
    output_sharding,
)
from autopar.ir.verify import check

IDLE_LABELS = ("replicate", "partial")
"""Labels that usually split no work; only the exceptions are marked in the file."""

_LABEL = re.compile(r"[A-Za-z0-9_.+*-]+!?")


def format_strategy(strategy: Strategy) -> str:
    """One line of an op's strategy; see the module docstring."""
    labels = ",".join(_format_label(axis) for axis in strategy)
    first = strategy[0] if strategy else AxisStrategy("", (), (), False)
    inputs = "; ".join(format_sharding(input_sharding(strategy, i)) for i in range(len(first.inputs)))
    outputs = "; ".join(format_sharding(output_sharding(strategy, i)) for i in range(len(first.outputs)))
    return f"{labels}: {inputs} -> {outputs}"


def parse_strategy(text: str) -> Strategy:
    """Inverse of `format_strategy`. Raises ValueError for anything else."""
    labels_text, colon, rest = text.partition(": ")
    inputs_text, arrow, outputs_text = rest.partition(" -> ")
    if not colon or not arrow:
        raise ValueError(f"not a strategy, 'labels: inputs -> outputs': {text!r}")
    labels = labels_text.split(",") if labels_text else []
    inputs = [parse_sharding(part) for part in inputs_text.split("; ")] if inputs_text else []
    outputs = [parse_sharding(part) for part in outputs_text.split("; ")] if outputs_text else []
    for sharding in (*inputs, *outputs):
        if len(sharding) != len(labels):
            raise ValueError(f"{len(labels)} labels but {len(sharding)} placements in {text!r}")
    return tuple(
        _parse_label(label, tuple(s[axis] for s in inputs), tuple(s[axis] for s in outputs))
        for axis, label in enumerate(labels)
    )


def _format_label(axis: AxisStrategy) -> str:
    is_usual = axis.splits_work == (axis.label not in IDLE_LABELS)
    return axis.label + ("" if is_usual else "!")


def _parse_label(text: str, inputs: Sharding, outputs: Sharding) -> AxisStrategy:
    if not _LABEL.fullmatch(text):
        raise ValueError(f"not a strategy label: {text!r}")
    label = text.removesuffix("!")
    return AxisStrategy(label, inputs, outputs, (label not in IDLE_LABELS) != text.endswith("!"))


def format_parameter(strategy: ParameterStrategy) -> str:
    """One line of a parameter's strategy; see the module docstring."""
    return ", ".join(f"{a.label} {a.storage}/{a.exposed}/{a.optimizer}" for a in strategy)


def parse_parameter(text: str) -> ParameterStrategy:
    """Inverse of `format_parameter`. Raises ValueError for anything else."""
    return tuple(_parse_parameter_axis(part) for part in text.split(", ")) if text else ()


def _parse_parameter_axis(text: str) -> ParameterAxisStrategy:
    label, _, placements = text.partition(" ")
    parts = placements.split("/")
    if label not in PARAMETER_LABELS or len(parts) != 3:
        raise ValueError(f"not a parameter strategy, 'label storage/exposed/optimizer': {text!r}")
    return ParameterAxisStrategy(label, *(parse_placement(part) for part in parts))


def format_mesh(mesh: StageMesh) -> str:
    """`dp=4,tp=2`."""
    return ",".join(f"{axis.name}={axis.size}" for axis in mesh.axes)


def parse_mesh(text: str) -> StageMesh:
    """Inverse of `format_mesh`. Raises ValueError for anything else."""
    axes = []
    for part in text.split(",") if text else []:
        name, _, size = part.partition("=")
        if not re.fullmatch(r"[0-9]{1,9}", size):
            raise ValueError(f"not a mesh, 'dp=4,tp=2': {text!r}")
        axes.append(MeshAxis(name, int(size)))
    return StageMesh(tuple(axes))


FORMS: Mapping[Any, TextForm] = {
    StageMesh: TextForm(format_mesh, parse_mesh),
    Sharding: TextForm(format_sharding, parse_sharding),
    Strategy: TextForm(format_strategy, parse_strategy),
    ParameterStrategy: TextForm(format_parameter, parse_parameter),
}


def quantity_json(quantity: Quantity) -> dict[str, Any]:
    """The machine-readable form of one figure."""
    return {name: getattr(quantity, name) for name in ("value", "unit", "label", "low", "high")}


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """The `predicted` block."""
    block: dict[str, Any] = encode(prediction, Prediction, FORMS)
    return block


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON values."""
    content: dict[str, Any] = encode(plan, Plan, FORMS)
    return content


def dump_plan(plan: Plan) -> str:
    """Text of the plan file."""
    return format_json(plan_json(plan))


def parse_plan(text: str, name: str = "plan") -> Plan:
    """Inverse of `dump_plan`.

    Raises:
        PlanMismatchError: not a plan of this schema; says where and what to do.
    """
    try:
        content = parse_json(text)
        _check_version(content, name)
        plan: Plan = decode(content, Plan, FORMS)
    except DecodeError as error:
        raise PlanMismatchError(
            f"{name} is not a plan that this autopar can read\n  at {error.path}: {error.problem}\n"
            "  make it again with 'autopar plan'"
        ) from error
    check(plan, name=name)
    return plan


def load_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: there is no such readable file.
        PlanMismatchError: it is not a plan of this schema.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the plan file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanMismatchError(f"{path} is not a plan: it is not UTF-8 text (byte {error.start})") from error
    return parse_plan(text, str(path))


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan file atomically: readers see the old file or the new one, never a part. Raises InputError."""
    write_atomic(path, dump_plan(plan))


def plan_digest(plan: Plan) -> str:
    """SHA-256 of everything that equal inputs make equal: all but `created` and `solver.wall_s`."""
    content = plan_json(plan)
    del content["created"], content["solver"]["wall_s"]
    return hashlib.sha256(format_json(content).encode()).hexdigest()


def _check_version(content: Any, name: str) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version == SCHEMA_VERSION:
        return
    advice = "upgrade autopar" if version > SCHEMA_VERSION else "make it again with 'autopar plan'"
    raise PlanMismatchError(
        f"{name} has plan schema {version}\n  at $.schema_version: this autopar reads schema {SCHEMA_VERSION}\n"
        f"  {advice}"
    )


def check_writable(path: str | Path, flag: str = "--out") -> None:
    """Fail before long work when `path`, given with `flag`, cannot be written later. Leaves nothing behind.

    Raises:
        InputError: the directory is missing or refuses a new file, or `path` is a directory.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; give a file name with {flag}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another path with {flag}") from error


def write_atomic(path: str | Path, text: str) -> None:
    """Write text beside `path`, flush it to disk, then rename over it. Raises InputError if that fails."""
    target = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another path with --out") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
