"""Data that ships: every number of costmodels/ has a unit and a source, every file matches the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autopar.cost.device import read_device
from autopar.profiler.store import read_rows

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "costmodels").glob("*.json") if path.stem not in ("schema", "software"))
SCHEMA = json.loads((ROOT / "costmodels" / "schema.json").read_text())
REQUIRED = {
    "k20", "v100-sxm2-32gb", "a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm-80gb", "h100-pcie-80gb", "h200-sxm-141gb",
    "b200-sxm-180gb", "l4", "l40s", "rtx-4090", "mi300x", "cpu",
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Violations of the part of JSON Schema that schema.json uses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "const" in schema and value != schema["const"]:
        yield f"{path}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if schema.get("type") == "object":
        yield from (f"{path}: {key} is missing" for key in schema.get("required", ()) if key not in value)
        yield from (f"{path}: {key} is unknown" for key in value if key not in schema["properties"])
        for key in value.keys() & schema["properties"].keys():
            yield from faults(value[key], schema["properties"][key], f"{path}.{key}")
    if schema.get("type") == "number" and not value > schema["exclusiveMinimum"]:
        yield f"{path}: {value!r} is not positive"
    if schema.get("type") == "string":
        if len(value) < schema.get("minLength", 0):
            yield f"{path}: too short"
        if not re.search(schema.get("pattern", ""), value):
            yield f"{path}: {value!r} does not match"


def test_required_devices_are_there() -> None:
    assert {path.stem for path in FILES} >= REQUIRED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_device_file_matches_the_schema(path: Path) -> None:
    content = json.loads(path.read_text())
    assert list(faults(content, SCHEMA)) == []
    assert content["name"] == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_has_a_source_and_none_is_a_path(path: Path) -> None:
    numbers = read_device(path).numbers
    assert len(numbers) > 30
    for number in numbers:
        assert len(number.source) >= 10
        assert not re.search(r"(^|\s)(\.\.|~)?/\w+/", number.source), number


def test_a_planted_fault_is_caught() -> None:
    content = json.loads(FILES[0].read_text())
    content["memory"]["efficiency"].pop("source")
    content["memory"]["speed"] = 1
    assert len(list(faults(content, SCHEMA))) == 2


def test_every_shipped_profile_row_has_provenance() -> None:
    for path in sorted((ROOT / "profiles").glob("*.jsonl")):
        for row in read_rows(path):
            assert {"machine", "date", "torch"} <= set(row.provenance)
            assert row.repeats >= 1
