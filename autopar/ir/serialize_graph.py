"""Graph files: `OpGraph` to strict JSON and back, and the hash that names a graph.

A saved graph lets planning, checking and explaining work without torch. One op and one value take one line each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.codec import DecodeError, TextForm, decode, encode, format_json, parse_json
from autopar.ir.graph import Arg, Block, Op, OpGraph, Output, Ref, Value
from autopar.ir.serialize import write_atomic
from autopar.ir.tensor import TensorMeta

GRAPH_SCHEMA_VERSION = 1


def _format_meta(meta: TensorMeta) -> str:
    return f"{meta.dtype}[{','.join(map(str, meta.shape))}]"


def _parse_meta(text: str) -> TensorMeta:
    dtype, bracket, sizes = text.removesuffix("]").partition("[")
    if not bracket or not text.endswith("]"):
        raise ValueError(f"not a tensor, 'float32[2,3]': {text!r}")
    return TensorMeta(tuple(int(size) for size in sizes.split(",")) if sizes else (), dtype)


def _encode_arg(arg: Arg) -> Any:
    """References are `{"ref": i}`; floats that JSON lacks are `{"float": "inf"}`."""
    if isinstance(arg, Ref):
        return {"ref": arg.index}
    if isinstance(arg, tuple):
        return [_encode_arg(item) for item in arg]
    if isinstance(arg, float) and not float("-inf") < arg < float("inf"):
        return {"float": str(arg)}
    return arg


def _decode_arg(value: Any, path: str) -> Arg:
    if isinstance(value, list):
        return tuple(_decode_arg(item, path) for item in value)
    if not isinstance(value, dict):
        scalar: bool | int | float | str | None = value
        return scalar
    if value.keys() == {"ref"} and isinstance(value["ref"], int):
        return Ref(value["ref"])
    if value.keys() == {"float"} and value["float"] in ("inf", "-inf", "nan"):
        return float(value["float"])
    raise DecodeError(path, "not an argument")


FORMS: Mapping[Any, TextForm] = {TensorMeta: TextForm(_format_meta, _parse_meta)}
_PLAIN_OP_FIELDS = tuple(name for name in Op.__dataclass_fields__ if name not in ("args", "kwargs", "members"))


def _encode_op(op: Op) -> dict[str, Any]:
    """Fields at their default are left out."""
    content: dict[str, Any] = {"args": _encode_arg(op.args)}
    plain = {name: getattr(op, name) for name in _PLAIN_OP_FIELDS}
    content |= {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items() if v not in ("", 0, ())}
    content |= {"inputs": list(op.inputs), "outputs": list(op.outputs), "block": op.block}
    if op.kwargs:
        content["kwargs"] = {key: _encode_arg(arg) for key, arg in op.kwargs.items()}
    if op.members:
        content["members"] = [_encode_op(member) for member in op.members]
    return content


def _decode_op(content: Any, path: str) -> Op:
    if not isinstance(content, dict):
        raise DecodeError(path, "expected an object")
    unknown = sorted(content.keys() - Op.__dataclass_fields__.keys())
    if unknown:
        raise DecodeError(f"{path}.{unknown[0]}", "unknown key")
    required = ("args", "block", "inputs", "name", "outputs", "target")
    missing = [name for name in required if name not in content]
    if missing:
        raise DecodeError(f"{path}.{missing[0]}", "missing key")
    texts, counts = tuple[str, ...], ("flops_forward", "flops_backward", "saved_extra_bytes", "block")
    hints: dict[str, Any] = dict.fromkeys(("inputs", "outputs", "mutates", "saved"), texts)
    hints |= dict.fromkeys(("name", "target", "module_path", "source"), str) | dict.fromkeys(counts, int)
    hints |= {"is_shared": bool}
    fields = {n: decode(content[n], hints[n], FORMS, f"{path}.{n}") for n in _PLAIN_OP_FIELDS if n in content}
    args = _decode_arg(content["args"], f"{path}.args")
    if not isinstance(args, tuple):
        raise DecodeError(f"{path}.args", "expected a list")
    kwargs = {str(key): _decode_arg(arg, f"{path}.kwargs") for key, arg in content.get("kwargs", {}).items()}
    members = tuple(_decode_op(m, f"{path}.members[{i}]") for i, m in enumerate(content.get("members", [])))
    return Op(args=args, kwargs=kwargs, members=members, **fields)


def graph_json(graph: OpGraph) -> dict[str, Any]:
    """The whole graph as JSON values; outputs only where there are any."""
    outputs = {"outputs": [encode(output, Output, FORMS) for output in graph.outputs]} if graph.outputs else {}
    return outputs | {
        "schema_version": GRAPH_SCHEMA_VERSION,
        "name": graph.name,
        "ops": [_encode_op(op) for op in graph.ops],
        "values": [encode(value, Value, FORMS) for value in graph.values.values()],
        "blocks": [encode(block, Block, FORMS) for block in graph.blocks],
        "loss": graph.loss,
        "batch_size": graph.batch_size,
        "optimizer": graph.optimizer,
    }


def dump_graph(graph: OpGraph) -> str:
    """Text of a graph file."""
    return format_json(graph_json(graph))


def parse_graph(text: str, name: str = "graph") -> OpGraph:
    """Inverse of `dump_graph`. Raises PlanMismatchError for anything else."""
    try:
        content = parse_json(text)
        keys = {"schema_version", *OpGraph.__dataclass_fields__}
        if not isinstance(content, dict) or {"outputs", *content.keys()} != keys:
            raise DecodeError("$", f"expected the keys {', '.join(sorted(keys))}")
        if content["schema_version"] != GRAPH_SCHEMA_VERSION:
            raise DecodeError("$.schema_version", f"this autopar reads {GRAPH_SCHEMA_VERSION}")
        return _decode_graph(content)
    except DecodeError as error:
        raise PlanMismatchError(
            f"{name} is not a graph that this autopar can read\n  at {error.path}: {error.problem}"
        ) from error


def _decode_graph(content: dict[str, Any]) -> OpGraph:
    values = decode(content["values"], tuple[Value, ...], FORMS, "$.values")
    if not isinstance(content["ops"], list):
        raise DecodeError("$.ops", "expected a list")
    scalars = {"name": str, "loss": str, "optimizer": str, "batch_size": int}
    return OpGraph(
        ops=tuple(_decode_op(op, f"$.ops[{i}]") for i, op in enumerate(content["ops"])),
        values={value.name: value for value in values},
        blocks=decode(content["blocks"], tuple[Block, ...], FORMS, "$.blocks"),
        outputs=decode(content.get("outputs", []), tuple[Output, ...], FORMS, "$.outputs"),
        **{name: decode(content[name], kind, FORMS, f"$.{name}") for name, kind in scalars.items()},
    )


def load_graph(path: str | Path) -> OpGraph:
    """Read a graph file. Raises InputError or PlanMismatchError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the graph file {path}: {error}") from error
    return parse_graph(text, str(path))


def save_graph(graph: OpGraph, path: str | Path) -> None:
    """Write a graph file atomically. Raises InputError."""
    write_atomic(path, dump_graph(graph))


def graph_hash(graph: OpGraph) -> str:
    """SHA-256 of ops, shapes and wiring; the name of the graph and source lines do not count."""
    anonymous = replace(graph, name="", ops=tuple(replace(op, source="") for op in graph.ops))
    content = graph_json(anonymous)
    for op in content["ops"]:
        for member in op.get("members", []):
            member.pop("source", None)
    return hashlib.sha256(format_json(content).encode()).hexdigest()
