"""Cluster files: JSON (or YAML, where PyYAML is installed) that describes GPUs of several types.

    {"groups": [{"gpu": "h100-sxm-80gb", "nodes": 2, "gpus_per_node": 8},
                {"gpu": "a100-sxm-80gb", "nodes": [8, 8, 4], "memory": "70GiB"}],
     "link": {"bandwidth_gb_s": 25, "latency_us": 10}}

`nodes` is a number of nodes with `gpus_per_node` GPUs each, or a list of the GPUs of each node. `link` is the one
between groups: gigabytes (1e9) per second of a whole node and direction, and microseconds of a send; what it leaves
out is that of the slower group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.ir.cluster import ClusterDescription, GroupDescription, LinkDescription

GROUP_KEYS = ("gpu", "nodes", "gpus_per_node", "memory")
LINK_KEYS = ("bandwidth_gb_s", "latency_us")


def read_cluster(path: str, parse_bytes: Callable[[str], int]) -> ClusterDescription:
    """The description in a file; `parse_bytes` reads sizes such as `70GiB`.

    Raises:
        InputError: it cannot be read, or says something wrong; names the key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the cluster file {path}: {error}") from error
    try:
        return _description(_parse(text, path), parse_bytes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _parse(text: str, path: str) -> Any:
    if not path.endswith((".yaml", ".yml")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise InputError(f"not JSON: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise InputError("YAML needs PyYAML: pip install pyyaml; or write the file as JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}") from error


def _description(content: Any, parse_bytes: Callable[[str], int]) -> ClusterDescription:
    top = _object(content, "the file", ("groups", "link"))
    groups = top.get("groups")
    if not isinstance(groups, list) or not groups:
        raise InputError("groups: expected a list of at least one group")
    found = tuple(_group(group, f"groups[{i}]", parse_bytes) for i, group in enumerate(groups))
    if "link" not in top:
        return ClusterDescription(found)
    if len(found) == 1:
        raise InputError("link: it joins groups, and there is one")
    link = _object(top["link"], "link", LINK_KEYS)
    bandwidth, latency = (_number(link, name) for name in LINK_KEYS)
    return ClusterDescription(
        found,
        LinkDescription(
            None if bandwidth is None else bandwidth * 1e9,
            None if latency is None else latency * 1e-6,
        ),
    )


def _object(content: Any, where: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected an object with {', '.join(keys)}")
    for key in content:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(keys)}")
    return content


def _number(link: Mapping[str, Any], name: str) -> float | None:
    value = link.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"link.{name}: expected a positive number, found {value!r}")
    return float(value)


def _group(content: Any, where: str, parse_bytes: Callable[[str], int]) -> GroupDescription:
    group = _object(content, where, GROUP_KEYS)
    gpu, nodes, memory = group.get("gpu"), group.get("nodes"), group.get("memory")
    if not isinstance(gpu, str):
        raise InputError(f"{where}.gpu: expected the name of a GPU (see 'autopar gpus')")
    if isinstance(nodes, list):
        if "gpus_per_node" in group:
            raise InputError(f"{where}.gpus_per_node: the list in nodes says how many GPUs each node has")
        sizes = tuple(_count(size, f"{where}.nodes[{i}]") for i, size in enumerate(nodes))
    else:
        sizes = (_count(group.get("gpus_per_node"), f"{where}.gpus_per_node"),) * _count(nodes, f"{where}.nodes")
    if not sizes:
        raise InputError(f"{where}.nodes: expected at least one node")
    if memory is None:
        return GroupDescription(gpu, sizes)
    try:
        return GroupDescription(gpu, sizes, parse_bytes(str(memory)))
    except InputError as error:
        raise InputError(f"{where}.memory: {error}") from error


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: expected a whole number of at least 1, found {value!r}")
    return value
