"""ProfileStore: measured rows as JSON lines, one measurement each, with provenance.

A store may hold rows of several devices; a lookup is made for one. Later rows replace earlier ones of the same key.
Files are replaced as a whole, so a killed run leaves the old file or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.graph import Arg, Ref
from autopar.ir.profile import OpProfile, ProfileKey
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


def read_rows(path: Path) -> tuple[OpProfile, ...]:
    """All rows of a file.

    Raises:
        InputError: if the file cannot be read or a line is no row; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(_parse(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}:{number} is no profile row: {error}") from error
    return tuple(rows)


def load_profile(path: str | Path, device: str) -> ProfileStore:
    """The rows of one device (kebab-case name). Raises InputError for a file that is no profile."""
    return ProfileStore(read_rows(Path(path)), device)


def append_rows(path: str | Path, rows: Iterable[OpProfile]) -> int:
    """Adds rows to a file, made if missing; a row replaces an older one of the same key. Returns the rows now there.

    Raises:
        InputError: if the file is no profile or cannot be written.
    """
    path = Path(path)
    old = read_rows(path) if path.exists() else ()
    merged = {row.key: row for row in (*old, *rows)}
    text = "".join(json.dumps(_encode(row), sort_keys=True) + "\n" for row in merged.values())
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise InputError(f"profile {path} cannot be written: {error}") from error
    return len(merged)


def _encode(row: OpProfile) -> dict[str, Any]:
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


def _parse(content: Mapping[str, Any]) -> OpProfile:
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
