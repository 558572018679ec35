"""`autopar plan` twice: the same output, said to be recalled, without torch."""

from __future__ import annotations

import subprocess
import sys

from tests.cli.helpers import Cli

SECOND_RUN = """
import sys
from autopar.cli.app import invoke
code = invoke({arguments!r})
assert not {{"torch", "transformers"}} & sys.modules.keys(), "a hit imports torch"
sys.exit(code)
"""
ARGUMENTS = ("plan", "model.py", "--gpus", "2", "--gpu", "l4")


def test_the_second_run_prints_the_same_and_says_so(cli: Cli) -> None:
    first = cli(*ARGUMENTS)
    plan = (cli.directory / "plan.json").read_bytes()
    (cli.directory / "plan.json").unlink()
    second = cli(*ARGUMENTS)
    assert (first.code, second.code) == (0, 0)
    assert (cli.directory / "plan.json").read_bytes() == plan
    told = [line for line in second.out.splitlines() if line.startswith("Cache ")]
    assert len(told) == 1
    assert [line for line in second.out.splitlines() if line not in told] == first.out.splitlines()
    bare = cli(*ARGUMENTS, "--no-cache")
    assert "\nCache " not in bare.out


def test_json_does_not_show_where_it_comes_from(cli: Cli) -> None:
    first, second, bare = cli(*ARGUMENTS, "--json"), cli(*ARGUMENTS, "--json"), cli(*ARGUMENTS, "--json", "--no-cache")
    assert first.out == second.out
    kept = [{k: v for k, v in outcome.json.items() if k not in ("created", "solver")} for outcome in (first, bare)]
    assert kept[0] == kept[1]
    assert {**first.json["solver"], "wall_s": 0} == {**bare.json["solver"], "wall_s": 0}


def test_an_infeasible_request_stays_infeasible(cli: Cli) -> None:
    arguments = (*ARGUMENTS, "--memory", "10b")
    first, second = cli(*arguments), cli(*arguments)
    assert (first.code, second.code) == (3, 3)
    assert first.err == second.err


def test_a_hit_imports_neither_torch_nor_transformers(cli: Cli) -> None:
    assert cli(*ARGUMENTS).code == 0
    script = SECOND_RUN.format(arguments=list(ARGUMENTS))
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nCache " in done.stdout
