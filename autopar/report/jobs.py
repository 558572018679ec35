"""Job files: scripts and manifests that start a plan on a scheduler's hosts as `autopar run` would by hand.

Text is a function of the job alone. Every value that the user gave is quoted for the language it lands in.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NCCL_DEFAULTS: Mapping[str, str] = {"NCCL_DEBUG": "WARN"}
"""Say what NCCL cannot do."""
SHARED_MEMORY = "/dev/shm"
PLAN_MOUNT = "/autopar"
CHECKPOINT_MOUNT = "/checkpoints"
RESTARTS = 6
"""Times that each host's processes may be started again."""
PRINTABLE = re.compile(r"[\x21-\x7e][\x20-\x7e\n]*[\x21-\x7e]\n")
"""Text that a literal block keeps as it is."""
PLAIN_YAML = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*\Z")
YAML_WORDS = frozenset(["true", "false", "yes", "no", "on", "off", "null", "none", "y", "n"])


@dataclass(frozen=True)
class Job:
    """What is to be started.

    Attributes:
        name: of the job: lower case letters, digits and dashes.
        plan_file: as the job's hosts see it (Slurm), or the base name in the job's own volume (Kubernetes).
        nodes, processes_per_node: hosts and ranks on each.
        gpus_per_node: 0 for a plan that runs on processors.
        steps: of training, in all.
        port: of the meeting.
        timeout_s: of a collective.
        checkpoints: directory that all hosts share; "": none.
        every: steps between checkpoints; 0: one at the end.
        time_s: limit of the job; None: the scheduler's own.
        environment: variables for NCCL besides the defaults.
    """

    name: str
    plan_file: str
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    steps: int
    port: int
    timeout_s: float
    checkpoints: str = ""
    every: int = 0
    time_s: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """Environment of every host, by name."""
        return dict(sorted({**(NCCL_DEFAULTS if self.gpus_per_node else {}), **self.environment}.items()))

    def command(self, plan_file: str, rank: str, address: str) -> str:
        """The shell's command of one host; `rank` and `address` are words of the shell as they are."""
        words = ["autopar", "run", shlex.quote(plan_file), "--steps", str(self.steps)]
        words += ["--timeout", f"{self.timeout_s:g}"]
        if self.checkpoints:
            words += ["--checkpoint", shlex.quote(self.checkpoints)]
        if self.every:
            words += ["--checkpoint-every", str(self.every)]
        if self.nodes > 1:
            words += ["--nodes", str(self.nodes), "--node-rank", rank]
            words += ["--master-addr", address, "--master-port", str(self.port)]
        return " ".join(words)


@dataclass(frozen=True)
class Slurm:
    """What only Slurm asks. Empty: the cluster's default."""

    partition: str = ""
    account: str = ""


@dataclass(frozen=True)
class Kubernetes:
    """What only Kubernetes asks.

    Attributes:
        image: with autopar, torch and the model's files below `directory`.
        directory: in which the command runs.
        plan_text: content of the plan file.
        gpu_resource: name under which nodes offer their GPUs.
        claim: of a volume that all hosts may write, for checkpoints; "": none.
    """

    image: str
    directory: str
    plan_text: str
    gpu_resource: str = "nvidia.com/gpu"
    claim: str = ""


SLURM_MEETING = """\
# All ranks meet at the first host, by the number under which the last host finds it.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=$(head -n 1 <<< "$hosts")
last=$(tail -n 1 <<< "$hosts")
address=$(srun --nodes=1 --ntasks=1 --nodelist="$last" getent ahostsv4 "$first" | awk 'NR == 1 {print $1}')
export address"""


def slurm_script(job: Job, slurm: Slurm) -> str:
    """An sbatch script: one task per host, which starts the ranks of its host."""
    parts = [_slurm_header(job, slurm), "set -euo pipefail"]
    if job.variables:
        parts.append("\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.variables.items()))
    command = job.command(job.plan_file, '"$SLURM_NODEID"', '"$address"')
    if job.nodes > 1:
        parts += [SLURM_MEETING, f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + command)}"]
    else:
        parts.append(f"srun {command}")
    return "\n\n".join(parts) + "\n"


def _slurm_header(job: Job, slurm: Slurm) -> str:
    options = [f"job-name={job.name}", f"nodes={job.nodes}", "ntasks-per-node=1"]
    if job.gpus_per_node:
        options.append(f"gpus-per-node={job.gpus_per_node}")
    else:
        options.append(f"cpus-per-task={job.processes_per_node}")
    if job.time_s is not None:
        options.append(f"time={job.time_s // 3600:02d}:{job.time_s // 60 % 60:02d}:{job.time_s % 60:02d}")
    options += [
        f"{name}={value}" for name, value in (("partition", slurm.partition), ("account", slurm.account)) if value
    ]
    options += ["output=%x-%j.out", "open-mode=append"]
    if job.checkpoints:
        options.append("requeue")
    return "\n".join(["#!/bin/bash", *(f"#SBATCH --{option}" for option in options)])


def kubernetes_manifest(job: Job, kubernetes: Kubernetes) -> str:
    """A volume with the plan, a service that names the hosts, and a job with one pod per host; YAML."""
    labels = {"app.kubernetes.io/name": job.name, "app.kubernetes.io/managed-by": "autopar"}
    plan = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-plan", "labels": labels},
        "data": {job.plan_file: kubernetes.plan_text},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app.kubernetes.io/name": job.name},
            "ports": [{"name": "meeting", "port": job.port}],
        },
    }
    work = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": labels},
        "spec": _job_spec(job, kubernetes, labels),
    }
    documents = [plan, service, work] if job.nodes > 1 else [plan, work]
    return "---\n".join("\n".join(_yaml(document)) + "\n" for document in documents)


def _job_spec(job: Job, kubernetes: Kubernetes, labels: Mapping[str, str]) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": RESTARTS * job.nodes,
    }
    if job.time_s is not None:
        spec["activeDeadlineSeconds"] = job.time_s
    pod: dict[str, Any] = {"restartPolicy": "OnFailure"} | ({"subdomain": job.name} if job.nodes > 1 else {})
    pod["containers"] = [_container(job, kubernetes)]
    pod["volumes"] = [
        {"name": "plan", "configMap": {"name": f"{job.name}-plan"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    if kubernetes.claim:
        pod["volumes"].append({"name": "checkpoints", "persistentVolumeClaim": {"claimName": kubernetes.claim}})
    return spec | {"template": {"metadata": {"labels": dict(labels)}, "spec": pod}}


def _container(job: Job, kubernetes: Kubernetes) -> dict[str, Any]:
    # Pod 0 of an indexed job is called NAME-0, and found below the service.
    command = job.command(f"{PLAN_MOUNT}/{job.plan_file}", '"$JOB_COMPLETION_INDEX"', f"{job.name}-0.{job.name}")
    mounts = [{"name": "plan", "mountPath": PLAN_MOUNT}, {"name": "shared-memory", "mountPath": SHARED_MEMORY}]
    if kubernetes.claim:
        mounts.append({"name": "checkpoints", "mountPath": CHECKPOINT_MOUNT})
    if job.gpus_per_node:
        asked = {kubernetes.gpu_resource: str(job.gpus_per_node)}
    else:
        asked = {"cpu": str(job.processes_per_node)}
    found: dict[str, Any] = {
        "name": "train",
        "image": kubernetes.image,
        "workingDir": kubernetes.directory,
        "command": ["/bin/sh", "-c", f"exec {command}"],
        "env": [{"name": name, "value": value} for name, value in job.variables.items()],
        "ports": [{"name": "meeting", "containerPort": job.port}],
        "resources": {"limits": asked, "requests": asked},
        "volumeMounts": mounts,
    }
    return {key: value for key, value in found.items() if value != []}


def _yaml(value: Any, indent: int = 0) -> list[str]:
    """Block-style lines of nested dicts and lists; strings are JSON's where YAML might read them otherwise."""
    pad = "  " * indent
    lines: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            name = _scalar(key)
            if isinstance(item, dict | list):
                lines += [f"{pad}{name}:", *_yaml(item, indent + 1)]
            elif isinstance(item, str) and "\n" in item and PRINTABLE.fullmatch(item):
                lines += [f"{pad}{name}: |", *(f"{pad}  {line}" if line else "" for line in item.splitlines())]
            else:
                lines.append(f"{pad}{name}: {_scalar(item)}")
        return lines
    for item in value:
        if isinstance(item, dict | list):
            first, *rest = _yaml(item, indent + 1)
            lines += [f"{pad}- {first.lstrip()}", *rest]
        else:
            lines.append(f"{pad}- {_scalar(item)}")
    return lines


def _scalar(value: object) -> str:
    if isinstance(value, str):
        is_plain = PLAIN_YAML.fullmatch(value) and value.lower() not in YAML_WORDS
        return value if is_plain else f'"{"".join(map(_escaped, value))}"'
    return json.dumps(value)


def _escaped(character: str) -> str:
    """As within double quotes."""
    if character in '"\\':
        return f"\\{character}"
    if " " <= character <= "~":
        return character
    return f"\\U{ord(character):08x}"
