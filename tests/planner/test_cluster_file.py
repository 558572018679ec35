"""Cluster files: what they mean, and errors that name the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.quantities import parse_bytes
from autopar.errors import InputError
from autopar.ir.cluster import ClusterDescription, GroupDescription, LinkDescription
from autopar.planner.cluster_file import read_cluster

GROUP = {"gpu": "l40s", "nodes": 2, "gpus_per_node": 4}


def read(directory: Path, content: Any) -> ClusterDescription:
    path = directory / "cluster.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_cluster(str(path), parse_bytes)


def test_a_whole_file(tmp_path: Path) -> None:
    other = {"gpu": "l4", "nodes": [8, 4], "memory": "20GiB"}
    link = {"bandwidth_gb_s": 25, "latency_us": 10}
    found = read(tmp_path, {"groups": [GROUP, other], "link": link})
    groups = (GroupDescription("l40s", (4, 4)), GroupDescription("l4", (8, 4), 20 * 2**30))
    assert found == ClusterDescription(groups, LinkDescription(25e9, pytest.approx(1e-5)))
    assert found.num_gpus == 20


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ([], "the file: expected an object"),
        ({"groups": []}, "groups: expected a list of at least one"),
        ({"groups": [GROUP], "nodes": 2}, "unknown key 'nodes'"),
        ({"groups": [GROUP | {"gpus": 2}]}, r"groups\[0\]: unknown key 'gpus'"),
        ({"groups": [GROUP | {"nodes": 0}]}, r"groups\[0\].nodes: .* found 0"),
        ({"groups": [GROUP, {"gpu": "l4", "nodes": [2, 0]}]}, r"groups\[1\].nodes\[1\]: .* found 0"),
        ({"groups": [{"gpu": "l4", "nodes": []}]}, r"groups\[0\].nodes: expected at least one node"),
        ({"groups": [GROUP | {"nodes": [2]}]}, r"groups\[0\].gpus_per_node: the list"),
        ({"groups": [{"gpu": "l4", "nodes": 2}]}, r"groups\[0\].gpus_per_node: expected a whole number"),
        ({"groups": [{"nodes": [2]}]}, r"groups\[0\].gpu: expected the name"),
        ({"groups": [GROUP | {"memory": "much"}]}, r"groups\[0\].memory: "),
        ({"groups": [GROUP], "link": {}}, "link: it joins groups"),
        ({"groups": [GROUP, GROUP], "link": {"speed": 3}}, "link: unknown key 'speed'"),
        ({"groups": [GROUP, GROUP], "link": {"latency_us": -1}}, "link.latency_us: expected a positive number"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path, content)


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the cluster file"):
        read_cluster(str(tmp_path / "none.json"), parse_bytes)
