"""`--cluster`: plans over several types of GPU, and what is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest

from tests.cli.helpers import MODEL, Cli

GROUPS = [
    {"gpu": "h100-sxm-80gb", "nodes": 1, "gpus_per_node": 1},
    {"gpu": "a100-sxm-80gb", "nodes": [1], "memory": "40GiB"},
]


def write(cli: Cli, groups: list[dict[str, object]]) -> None:
    cli.write("model.py", MODEL)
    cli.write("cluster.json", json.dumps({"groups": groups}))


def test_stages_lie_on_named_types(cli: Cli) -> None:
    write(cli, GROUPS)
    outcome = cli("plan", "model.py", "--cluster", "cluster.json", "--pin", "pp=2")
    assert outcome.code == 0, outcome.err
    assert "up to 1 x h100-sxm-80gb in 1 node + 1 x a100-sxm-80gb in 1 node" in " ".join(outcome.out.split())
    assert "(ranks 0) on " in outcome.out
    content = json.loads((cli.directory / "plan.json").read_text())
    gpus = [stage["gpu"] for stage in content["decisions"]["stages"]]
    assert sorted(gpus) == ["a100-sxm-80gb", "h100-sxm-80gb"]
    assert [group["nodes"] for group in content["cluster"]["description"]["groups"]] == [[1], [1]]
    assert cli("explain", "plan.json").code == 0
    why_not = cli("explain", "plan.json", "--why-not", "dp=1,tp=1,pp=1")
    assert why_not.code == 0, why_not.err
    content["decisions"]["stages"][0]["gpu"] = content["decisions"]["stages"][1]["gpu"] = "h100-sxm-80gb"
    cli.write("plan.json", json.dumps(content))
    assert "uses 2 x h100-sxm-80gb, the cluster has 1" in cli("explain", "plan.json").err


def test_one_group_is_planned_like_a_plain_cluster(cli: Cli) -> None:
    write(cli, [{"gpu": "h100-sxm-80gb", "nodes": 2, "gpus_per_node": 2}])
    described = cli("plan", "model.py", "--cluster", "cluster.json", "--json").json
    plain = cli("plan", "model.py", "--gpus", "4", "--gpu", "h100-sxm-80gb", "--gpus-per-node", "2", "--json").json
    for part in ("decisions", "predicted", "cluster", "baselines"):
        assert described[part] == plain[part]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpus", "2"), "--cluster says what --gpus would"),
        (("--gpu", "l40s"), "--cluster says what --gpu would"),
        (("--gpus-per-node", "2"), "--cluster says what --gpus-per-node would"),
        (("--memory", "40GiB"), "--cluster says what --memory would"),
        (("--profile", "rows.jsonl"), "one type of GPU"),
        (("--peak-power", "5kW"), "one type of GPU"),
    ],
)
def test_what_does_not_go_together_is_refused(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    write(cli, GROUPS)
    outcome = cli("plan", "model.py", "--cluster", "cluster.json", *arguments)
    assert outcome.code == 2
    assert says in outcome.err
    assert not (cli.directory / "plan.json").exists()


def test_wrong_files_name_the_key(cli: Cli) -> None:
    write(cli, [{**GROUPS[0], "nodes": 0}])
    outcome = cli("plan", "model.py", "--cluster", "cluster.json")
    assert outcome.code == 2
    assert "cluster.json: groups[0].nodes" in outcome.err
