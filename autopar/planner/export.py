"""Exporting a plan as a job of a scheduler: what the plan and the user's answers come to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from autopar.errors import InputError
from autopar.ir.hosts import DEFAULT_PORT, DEFAULT_TIMEOUT_S, Hosts
from autopar.ir.plan import Plan
from autopar.report.jobs import CHECKPOINT_MOUNT, Job, Kubernetes, Slurm, kubernetes_manifest, slurm_script

SCHEDULERS = ("slurm", "kubernetes")
LONGEST_NAME = 52
"""Kubernetes allows 63 characters, of which a pod's name needs some for its index and its suffix."""
LARGEST_PLAN_BYTES = 1_000_000
"""Of a ConfigMap, which may hold 1 MiB."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,-]*\Z")
RESOURCES: Mapping[str, str] = {"mi": "amd.com/gpu"}
"""Start of a GPU's name -> what nodes of a Kubernetes cluster call it; else NVIDIA's."""


@dataclass(frozen=True)
class ExportRequest:
    """What the user said about the job; empty: not said.

    Attributes:
        scheduler: of `SCHEDULERS`.
        name: of the job; default: of the plan file.
        nodes: hosts; 0: as many as the plan's GPUs fill.
        steps, timeout_s, checkpoints, every: as of `autopar run`.
        time_s: limit of the job.
        environment: variables for NCCL.
        partition, account: of Slurm.
        image, directory, claim: of Kubernetes; see `report.jobs.Kubernetes`.
    """

    scheduler: str
    name: str = ""
    nodes: int = 0
    steps: int = 10
    port: int = DEFAULT_PORT
    timeout_s: float = DEFAULT_TIMEOUT_S
    checkpoints: str = ""
    every: int = 0
    time_s: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    partition: str = ""
    account: str = ""
    image: str = ""
    directory: str = "/workspace"
    claim: str = ""


@dataclass(frozen=True)
class Exported:
    """A job file: its base name and its text."""

    name: str
    text: str


def export_plan(plan: Plan, plan_text: str, plan_file: str, request: ExportRequest) -> Exported:
    """The job file of a plan.

    Args:
        plan: to be run.
        plan_text: content of its file.
        plan_file: its path, which Slurm's hosts must share.
        request: see `ExportRequest`.

    Raises:
        InputError: an answer is missing, or cannot be.
    """
    job = _job(plan, plan_file, request)
    if request.scheduler == "slurm":
        for option, value in (("--partition", request.partition), ("--account", request.account)):
            _check_word(option, value)
        script = slurm_script(job, Slurm(request.partition, request.account))
        return Exported(f"{job.name}.sbatch", script)
    manifest = kubernetes_manifest(job, _kubernetes(plan, plan_text, request))
    return Exported(f"{job.name}.yaml", manifest)


def _job(plan: Plan, plan_file: str, request: ExportRequest) -> Job:
    count, is_slurm = plan.decisions.num_gpus, request.scheduler == "slurm"
    nodes = request.nodes or max(1, -(-count // plan.cluster.gpus_per_node))
    hosts = Hosts(nodes, 0, "host-0", request.port, request.timeout_s)
    for variable in request.environment:
        if not VARIABLE.match(variable):
            raise InputError(f"--env {variable}: not the name of a variable")
    if request.time_s is not None and request.time_s < 1:
        raise InputError(f"--time must be at least 1 s, got {request.time_s}")
    if not is_slurm and bool(request.checkpoints) != bool(request.claim):
        raise InputError("checkpoints on Kubernetes need both: --checkpoint DIR, and --claim with a volume for them")
    per_node = len(hosts.local_ranks(count))
    return Job(
        name=_name(request.name or Path(plan_file).stem),
        plan_file=plan_file if is_slurm else PurePosixPath(plan_file).name,
        nodes=nodes,
        processes_per_node=per_node,
        gpus_per_node=0 if plan.cluster.gpu == "cpu" else per_node,
        steps=request.steps,
        port=request.port,
        timeout_s=request.timeout_s,
        checkpoints=request.checkpoints if is_slurm else _below_mount(request.checkpoints),
        every=request.every,
        time_s=request.time_s,
        environment=request.environment,
    )


def _below_mount(directory: str) -> str:
    """Where a directory of the volume is in the container; paths cannot lead out of it."""
    if not directory:
        return ""
    parts = PurePosixPath(directory).parts
    if ".." in parts:
        raise InputError(f"--checkpoint {directory}: a path within the volume cannot lead out of it")
    return str(PurePosixPath(CHECKPOINT_MOUNT, *(part for part in parts if part != "/")))


def _kubernetes(plan: Plan, plan_text: str, request: ExportRequest) -> Kubernetes:
    if not request.image:
        raise InputError("--to kubernetes needs --image: one with autopar, torch and the model's files")
    if len(plan_text.encode()) > LARGEST_PLAN_BYTES:
        raise InputError(
            f"the plan has {len(plan_text.encode())} bytes; a ConfigMap holds {LARGEST_PLAN_BYTES} of them"
        )
    resource = next((name for start, name in RESOURCES.items() if plan.cluster.gpu.startswith(start)), "nvidia.com/gpu")
    return Kubernetes(request.image, request.directory, plan_text, resource, request.claim)


def _name(text: str) -> str:
    """Lower case letters, digits and dashes, as both schedulers take them."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    if not found or not found[0].isalpha():
        found = f"run-{found}".strip("-")
    return found


def _check_word(option: str, value: str) -> None:
    if value and not WORD.match(value):
        raise InputError(f"{option} {value}: letters, digits, dots, commas and dashes only")
