"""ProfileStore: measured rows as JSON lines, one measurement each, with provenance; a line may also hold a device.

A store may hold rows of several devices; a lookup is made for one. Later rows replace earlier ones of the same key.
Files are replaced as a whole, so a killed run leaves the old file or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.graph import Arg, Ref
from autopar.ir.profile import DeviceProfile, MeasuredLine, MeasuredNumber, OpProfile, ProfileKey
from autopar.ir.tensor import TensorMeta


class ProfileStore:
    """Rows of one device, by key."""

    def __init__(self, rows: Iterable[OpProfile], device: str) -> None:
        self._device = device
        self._rows = {row.key: row for row in rows if row.key.device == device}
        self._targets = {key.target for key in self._rows}

    @property
    def device(self) -> str:
        """Device that the rows were measured on."""
        return self._device

    def __len__(self) -> int:
        return len(self._rows)

    def has_target(self, target: str) -> bool:
        """Whether any row is of this op."""
        return target in self._targets

    def find(self, key: ProfileKey) -> OpProfile | None:
        """The row of a key."""
        return self._rows.get(key)


@dataclass(frozen=True)
class Contents:
    """All that a file holds; `devices` by name."""

    rows: tuple[OpProfile, ...]
    devices: Mapping[str, DeviceProfile]


def read_store(path: Path) -> Contents:
    """All of a file.

    Raises:
        InputError: if the file cannot be read or a line is neither row nor device; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} cannot be read: {error}") from error
    rows, devices = [], {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                content = json.loads(line)
                if "numbers" in content:
                    devices[content["device"]] = parse_device(content)
                else:
                    rows.append(parse_row(content))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}:{number} is no profile row: {error}") from error
    return Contents(tuple(rows), devices)


def read_rows(path: Path) -> tuple[OpProfile, ...]:
    """All rows of a file. Raises InputError as `read_store`."""
    return read_store(path).rows


def load_profile(path: str | Path, device: str) -> ProfileStore:
    """The rows of one device (kebab-case name). Raises InputError for a file that is no profile."""
    return ProfileStore(read_rows(Path(path)), device)


def append_rows(path: str | Path, rows: Iterable[OpProfile], device: DeviceProfile | None = None) -> int:
    """Adds rows to a file, made if missing; a row replaces an older one of the same key, and a device an older one
    of its name. Returns the rows now there.

    Raises:
        InputError: if the file is no profile or cannot be written.
    """
    path = Path(path)
    old = read_store(path) if path.exists() else Contents((), {})
    merged = {row.key: row for row in (*old.rows, *rows)}
    devices = dict(old.devices) if device is None else {**old.devices, device.device: device}
    contents = [*map(encode_device, devices.values()), *map(encode_row, merged.values())]
    text = "".join(json.dumps(content, sort_keys=True) + "\n" for content in contents)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise InputError(f"profile {path} cannot be written: {error}") from error
    return len(merged)


def encode_device(found: DeviceProfile) -> dict[str, Any]:
    """As a JSON object."""
    return asdict(found)


def parse_device(content: Mapping[str, Any]) -> DeviceProfile:
    """Inverse of `encode_device`. Raises ValueError, KeyError or TypeError for what is none."""
    numbers = tuple(MeasuredNumber(**entry) for entry in content["numbers"])
    if not all(0 < number.value < float("inf") for number in numbers):
        raise ValueError("the numbers of a device must be finite and above 0")
    lines = tuple(MeasuredLine(**entry) for entry in content["lines"])
    provenance = {str(name): str(value) for name, value in content["provenance"].items()}
    return DeviceProfile(str(content["device"]), numbers, lines, provenance)


def encode_row(row: OpProfile) -> dict[str, Any]:
    """As a JSON object."""
    return {
        "target": row.key.target,
        "inputs": [[list(meta.shape), meta.dtype] for meta in row.key.inputs],
        "args": _encode_arg(row.key.args),
        "kwargs": {name: _encode_arg(value) for name, value in row.key.kwargs},
        "device": row.key.device,
        "forward_s": row.forward_s,
        "backward_s": row.backward_s,
        "spread": row.spread,
        "peak_bytes": row.peak_bytes,
        "energy_j": row.energy_j,
        "repeats": row.repeats,
        "provenance": dict(row.provenance),
    }


def parse_row(content: Mapping[str, Any]) -> OpProfile:
    """Inverse of `encode_row`. Raises ValueError, KeyError or TypeError for what is none."""
    key = ProfileKey(
        content["target"],
        tuple(TensorMeta(tuple(shape), dtype) for shape, dtype in content["inputs"]),
        tuple(_decode_arg(arg) for arg in content["args"]),
        tuple(sorted((name, _decode_arg(arg)) for name, arg in content["kwargs"].items())),
        content["device"],
    )
    times = float(content["forward_s"]), float(content["backward_s"]), float(content["spread"])
    if not all(0 <= number < float("inf") for number in times):
        raise ValueError(f"times must be finite and not negative, found {times}")
    provenance = {str(name): str(value) for name, value in content["provenance"].items()}
    return OpProfile(
        key, *times, content["peak_bytes"], content["energy_j"], int(content["repeats"]), provenance
    )  # fmt: skip


def _encode_arg(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.index}
    return [_encode_arg(item) for item in arg] if isinstance(arg, tuple) else arg


def _decode_arg(content: Any) -> Arg:
    if isinstance(content, dict):
        return Ref(int(content["ref"]))
    if isinstance(content, list):
        return tuple(_decode_arg(item) for item in content)
    if content is None or isinstance(content, bool | int | float | str):
        return content
    raise TypeError(f"{content!r} is no argument")
