"""Codec: frozen dataclasses to plain JSON values and back, strictly.

`encode` turns dataclasses, tuples, mappings and scalars into JSON values; `decode` is its inverse, driven by the
type annotations, and refuses everything it does not know: an unknown or missing key, another type, NaN. Types that
have a text form (a sharding, a strategy) are given as `TextForm`s by the caller. `decode` names the JSON path
of the fault, e.g. `$.predicted.step_time_s.value`. What a file holds is decided in `serialize`, not here.

A field that came later than the first files is declared with `metadata=ADDED` and a default: it is written where it
differs from the default alone, so that older files are read, and what does not use it is written as before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LINE_WIDTH = 118
ADDED: Mapping[str, bool] = types.MappingProxyType({"added": True})
"""Metadata of a field that older files do not have."""


class DecodeError(ValueError):
    """A JSON value is not what the type asks for; `path` says where."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


@dataclass(frozen=True)
class TextForm:
    """How a type is written as one string. `parse` raises ValueError for text that is not one."""

    format: Callable[[Any], str]
    parse: Callable[[str], Any]


TextForms = Mapping[Any, TextForm]


def encode(value: Any, annotation: Any, forms: TextForms) -> Any:
    """JSON value of `value`, which has type `annotation`.

    Raises:
        ValueError: for a number that is not finite: JSON has none.
    """
    if annotation in forms:
        return forms[annotation].format(value)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints = _hints(annotation)
        added = _added(annotation)
        kept = [name for name in hints if name not in added or getattr(value, name) != added[name]]
        return {name: encode(getattr(value, name), hints[name], forms) for name in kept}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType or origin is typing.Union:
        present = next(a for a in arguments if a is not type(None))
        return None if value is None else encode(value, present, forms)
    if origin is tuple:
        return [encode(item, arguments[0], forms) for item in value]
    if origin is not None and issubclass(origin, Mapping):
        return {key: encode(item, arguments[1], forms) for key, item in value.items()}
    if annotation is float:
        if not math.isfinite(value):
            raise ValueError(f"not a finite number: {value}")
        return float(value)
    return value


def decode(value: Any, annotation: Any, forms: TextForms, path: str = "$") -> Any:
    """Inverse of `encode`.

    Raises:
        DecodeError: on the first thing that does not fit, with its path.
    """
    if annotation in forms:
        return _decode_text(value, forms[annotation], path)
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(value, annotation, forms, path)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType or origin is typing.Union:
        present = next(a for a in arguments if a is not type(None))
        return None if value is None else decode(value, present, forms, path)
    if origin is tuple:
        items = _expect(value, list, path)
        return tuple(decode(item, arguments[0], forms, f"{path}[{i}]") for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        pairs = _expect(value, dict, path)
        return {key: decode(item, arguments[1], forms, f"{path}.{key}") for key, item in pairs.items()}
    return _decode_scalar(value, annotation, path)


def parse_json(text: str) -> Any:
    """JSON without its lenient corners.

    Raises:
        DecodeError: not JSON, a repeated key, or NaN and the infinities.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except DecodeError:
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DecodeError("$", f"not JSON, or cut short: {error.msg} at {where}") from error
    except (RecursionError, ValueError) as error:
        raise DecodeError("$", f"not JSON that a plan could hold: {error}") from error


def format_json(value: Any) -> str:
    """Deterministic, readable JSON: sorted keys, and whatever fits on one line stands on one line."""
    return "".join(_lines(value, "", 0)) + "\n"


def _lines(value: Any, indent: str, offset: int) -> list[str]:
    """Text pieces of `value`; `offset` is how far its first line is indented already."""
    flat = json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or not value or len(flat) + offset <= LINE_WIDTH:
        return [flat]
    inner = indent + "  "
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    entries = sorted(value.items()) if isinstance(value, dict) else [("", item) for item in value]
    pieces = [opening]
    for position, (key, item) in enumerate(entries):
        label = json.dumps(key, ensure_ascii=False) + ": " if isinstance(value, dict) else ""
        pieces.append((",\n" if position else "\n") + inner + label)
        pieces += _lines(item, inner, len(inner) + len(label))
    return [*pieces, "\n" + indent + closing]


def _decode_dataclass(value: Any, annotation: Any, forms: TextForms, path: str) -> Any:
    pairs = _expect(value, dict, path)
    hints = _hints(annotation)
    unknown = sorted(pairs.keys() - hints.keys())
    missing = sorted(hints.keys() - pairs.keys() - _added(annotation).keys())
    if unknown:
        raise DecodeError(f"{path}.{unknown[0]}", f"unknown key; known here: {', '.join(sorted(hints))}")
    if missing:
        raise DecodeError(f"{path}.{missing[0]}", "missing key")
    fields = {n: decode(pairs[n], hint, forms, f"{path}.{n}") for n, hint in hints.items() if n in pairs}
    try:
        return annotation(**fields)
    except ValueError as error:
        raise DecodeError(path, str(error)) from error


def _decode_text(value: Any, form: TextForm, path: str) -> Any:
    text = _expect(value, str, path)
    try:
        return form.parse(text)
    except ValueError as error:
        raise DecodeError(path, str(error)) from error


def _decode_scalar(value: Any, annotation: Any, path: str) -> Any:
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DecodeError(path, f"expected a number, found {_shown(value)}")
        try:
            number = float(value)
        except OverflowError as error:
            raise DecodeError(path, "number too large") from error
        if not math.isfinite(number):
            raise DecodeError(path, f"expected a finite number, found {number}")
        return number
    if annotation is int and isinstance(value, bool):
        raise DecodeError(path, f"expected int, found {_shown(value)}")
    return _expect(value, annotation, path)


def _expect(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
        raise DecodeError(path, f"expected {names.get(kind, kind.__name__)}, found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@lru_cache(maxsize=256)
def _hints(annotation: Any) -> dict[str, Any]:
    return typing.get_type_hints(annotation)


@lru_cache(maxsize=256)
def _added(annotation: Any) -> dict[str, Any]:
    """Defaults of the fields that older files do not have."""
    return {field.name: field.default for field in dataclasses.fields(annotation) if "added" in field.metadata}


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DecodeError(f"$..{key}", "the key stands twice in one object")
        found[key] = value
    return found


def _refuse_constant(text: str) -> Any:
    raise DecodeError("$", f"{text} is not a number that a plan can hold")
