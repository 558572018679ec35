"""`autopar export`: what is written and told, and answers that are missing or cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.helpers import Cli


@pytest.fixture
def plan(cli: Cli) -> str:
    """A plan file for four GPUs."""
    made = cli(
        "plan", "model.py", "--gpus", "4", "--use-all", "--gpus-per-node", "2", "--gpu", "mi300x", "--out", "a.json"
    )
    assert made.code == 0
    return "a.json"


def test_the_file_and_the_command_that_hands_it_in_are_told(cli: Cli, plan: str) -> None:
    (cli.directory / "jobs").mkdir()
    told = cli("export", plan, "--to", "slurm", "--out", "jobs", "--json", "--name", "My Run!").json
    assert told == {"file": "jobs/my-run.sbatch", "submit": "sbatch jobs/my-run.sbatch"}
    script = Path(told["file"]).read_text()
    assert "#SBATCH --nodes=2\n" in script  # two GPUs per node
    assert "#SBATCH --gpus-per-node=2\n" in script
    text = cli("export", plan, "--to", "kubernetes", "--image", "x/y:1", "--nodes", "4", "--time", "2h").out
    assert text.splitlines()[-1].split() == ["Next", "kubectl", "apply", "-f", "a.yaml"]
    *_, job = yaml.safe_load_all(Path("a.yaml").read_text())
    assert job["spec"]["completions"] == 4
    assert job["spec"]["activeDeadlineSeconds"] == 7200
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"amd.com/gpu": "1"}


def test_the_same_answers_give_the_same_bytes(cli: Cli, plan: str) -> None:
    texts = set()
    for _ in range(2):
        assert cli("export", plan, "--to", "kubernetes", "--image", "x").code == 0
        texts.add(Path("a.yaml").read_bytes())
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "kubernetes"], "needs --image"),
        (["--to", "kubernetes", "--image", "x", "--checkpoint", "run"], "need both: --checkpoint DIR, and --claim"),
        (["--to", "kubernetes", "--image", "x", "--claim", "c", "--checkpoint", "../run"], "cannot lead out of it"),
        (["--to", "slurm", "--nodes", "3"], "4 processes do not divide into 3 hosts"),
        (["--to", "slurm", "--partition", "a\n#SBATCH --uid=0"], "letters, digits, dots, commas and dashes only"),
        (["--to", "slurm", "--env", "A B=1"], "not the name of a variable"),
        (["--to", "slurm", "--env", "NCCL_DEBUG"], "give NAME=VALUE"),
        (["--to", "slurm", "--timeout", "1"], "--timeout must be at least 2 s"),
        (["--to", "slurm", "--out", "nowhere"], "cannot write"),
    ],
)
def test_answers_that_cannot_be_are_one_message(cli: Cli, plan: str, arguments: list[str], message: str) -> None:
    found = cli("export", plan, *arguments)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert found.err.startswith("autopar: ")
    assert not list(cli.directory.glob("*.sbatch")) + list(cli.directory.glob("*.yaml"))
