"""Job files: golden text, what their languages allow, and the start of the run that they stand for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cli.app import autopar as command_group
from autopar.cli.hosts import hosts_of
from autopar.report.jobs import Job, Kubernetes, Slurm, kubernetes_manifest, slurm_script

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
JOB = Job(
    name="gpt2-xl",
    plan_file="plans/gpt2 xl.json",
    nodes=2,
    processes_per_node=8,
    gpus_per_node=8,
    steps=5000,
    port=29500,
    timeout_s=600.0,
    checkpoints="/shared/gpt2-xl",
    every=100,
    time_s=43200,
    environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1"},
)
PODS = Kubernetes("registry.example/train:1.2", "/workspace", '{\n "schema_version": 3\n}\n', claim="shared")
SINGLE = replace(
    JOB, plan_file="plan.json", nodes=1, gpus_per_node=0, checkpoints="", every=0, time_s=None, environment={}
)


def render(name: str) -> str:
    texts = {
        "job.sbatch": lambda: slurm_script(JOB, Slurm("gpu", "lab")),
        "job_single.sbatch": lambda: slurm_script(SINGLE, Slurm()),
        "job.yaml": lambda: kubernetes_manifest(
            replace(JOB, plan_file="gpt2-xl.json", checkpoints="/checkpoints/run"), PODS
        ),
        "job_single.yaml": lambda: kubernetes_manifest(SINGLE, replace(PODS, claim="")),
    }
    return texts[name]()


@pytest.mark.parametrize("name", ["job.sbatch", "job_single.sbatch", "job.yaml", "job_single.yaml"])
def test_text_is_the_golden_one(name: str, update_golden: bool) -> None:
    path = GOLDEN / name
    if update_golden:
        path.write_text(render(name))
    assert render(name) == path.read_text()


STUBS = {
    "scontrol": "echo host-a; echo host-b",
    "getent": 'echo "10.1.2.3  STREAM $2"; echo "10.1.2.3  DGRAM"',
    # Runs the command on each host of the job, or on the one that is named.
    "srun": """
nodes=$(seq 0 $(($SLURM_NNODES - 1)))
while [ "${1#--}" != "$1" ]; do
  case "$1" in --nodelist=*) nodes=0 ;; esac
  shift
done
for node in $nodes; do SLURM_NODEID=$node "$@"; done""",
    "autopar": 'printf "%s\\n" "$@" | python3 -c "import json, sys; print(json.dumps(sys.stdin.read().splitlines()))"',
}


def started(script: str, directory: Path, nodes: int) -> list[list[str]]:
    """Arguments of every `autopar` that the script starts, under a Slurm that stands in for a real one."""
    for name, body in STUBS.items():
        (directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (directory / name).chmod(0o755)
    environment = {
        "PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "host-[a-b]", "SLURM_NNODES": str(nodes)
    }  # fmt: skip
    found = subprocess.run(
        ["bash", "-s"], input=script, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Values of the options of `autopar run`."""
    command = command_group.commands[arguments[0]]
    found: dict[str, Any] = command.make_context("run", arguments[1:]).params
    return found


def test_the_script_starts_one_run_per_host(tmp_path: Path) -> None:
    runs = [parsed(arguments) for arguments in started(slurm_script(JOB, Slurm()), tmp_path, 2)]
    assert [run["node_rank"] for run in runs] == [0, 1]
    for run in runs:
        check_same_run(run, "plans/gpt2 xl.json", "10.1.2.3", "/shared/gpt2-xl")
    (single,) = [parsed(arguments) for arguments in started(slurm_script(SINGLE, Slurm()), tmp_path, 1)]
    assert (single["nodes"], single["plan_file"], single["checkpoints"]) == (1, "plan.json", "")


def check_same_run(run: dict[str, Any], plan_file: str, address: str, checkpoints: str) -> None:
    hosts = hosts_of(**{name: run[name] for name in ("nodes", "node_rank", "master_addr", "master_port", "timeout_s")})
    assert (hosts.num_nodes, hosts.address, hosts.port, hosts.timeout_s) == (2, address, 29500, 600.0)
    assert (run["plan_file"], run["checkpoints"], run["every"], run["steps"]) == (plan_file, checkpoints, 100, 5000)


def test_the_pods_start_the_same_run() -> None:
    job = replace(JOB, plan_file="gpt2-xl.json", checkpoints="/checkpoints/run")
    plan, service, work = yaml.safe_load_all(kubernetes_manifest(job, PODS))
    (container,) = work["spec"]["template"]["spec"]["containers"]
    shell, flag, line = container["command"]
    assert (shell, flag) == ("/bin/sh", "-c")
    for index in range(2):
        words = shlex.split(line.replace('"$JOB_COMPLETION_INDEX"', str(index)))
        assert words[:2] == ["exec", "autopar"]
        run = parsed(words[2:])
        assert run["node_rank"] == index
        check_same_run(run, "/autopar/gpt2-xl.json", "gpt2-xl-0.gpt2-xl", "/checkpoints/run")
    assert plan["data"] == {"gpt2-xl.json": PODS.plan_text}
    assert service["spec"]["clusterIP"] == "None"


def test_the_manifest_is_consistent_in_itself() -> None:
    plan, service, work = yaml.safe_load_all(kubernetes_manifest(replace(JOB, plan_file="p.json"), PODS))
    pod = work["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert [document["apiVersion"] for document in (plan, service, work)] == ["v1", "v1", "batch/v1"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"] == work["metadata"]["name"]
    assert work["spec"]["completions"] == work["spec"]["parallelism"] == 2
    assert work["spec"]["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"nvidia.com/gpu": "8"}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["plan"]["configMap"]["name"] == plan["metadata"]["name"]
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == "shared"
    assert {"name": "NCCL_IB_HCA", "value": "mlx5_0,mlx5_1"} in container["env"]
    assert all(isinstance(variable["value"], str) for variable in container["env"])


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r\x85\u2028\u2029"), min_size=1, max_size=12
)


@given(plan_text=st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=60), word=texts, value=texts)
@settings(max_examples=60, deadline=None)
def test_yaml_reads_back_what_was_given(plan_text: str, word: str, value: str) -> None:
    job = replace(JOB, plan_file="p.json", environment={"NCCL_X": value})
    pods = Kubernetes(word, word, plan_text, "nvidia.com/gpu", "")
    plan, _, work = yaml.safe_load_all(kubernetes_manifest(job, pods))
    (container,) = work["spec"]["template"]["spec"]["containers"]
    assert plan["data"]["p.json"] == plan_text
    assert (container["image"], container["workingDir"]) == (word, word)
    assert {"name": "NCCL_X", "value": value} in container["env"]


@pytest.mark.parametrize(
    "path", ["a b.json", "it's.json", '"; touch x; ".json', "$(touch x).json", "`x`.json", "-x.json"]
)
def test_no_path_is_run_by_the_shell(path: str, tmp_path: Path) -> None:
    job = replace(JOB, plan_file=path, checkpoints=path, environment={"NCCL_X": path})
    for arguments in started(slurm_script(job, Slurm()), tmp_path, 2):
        assert arguments[1] == path
        assert arguments[arguments.index("--checkpoint") + 1] == path
    assert not (tmp_path / "x").exists()
    assert not Path("x").exists()


@pytest.mark.parametrize("job", [JOB, SINGLE])
def test_bash_can_read_the_script(job: Job) -> None:
    subprocess.run(["bash", "-n"], input=slurm_script(job, Slurm()), text=True, check=True, timeout=60)
