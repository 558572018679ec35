"""The README tells the truth: its commands exist, its code runs, its session prints what it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from autopar.cli.app import autopar as command_group
from autopar.cli.app import invoke

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
SESSION = re.compile(r"(<!-- session -->\n```text\n)(.*?)(```)", re.DOTALL)
COMMAND = "autopar plan examples/gpt2.py --gpus 8 --objective energy"


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README.read_text()) if found == language]


def commands() -> list[str]:
    """Every call of `autopar` in a shell block, without what comes before it."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line[line.index("autopar ") :] for line in lines if re.search(r"(^|/| )autopar ", line)]


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_autopar_knows(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = command_group.commands[name]
    command.make_parser(click.Context(command)).parse_args(args=arguments)


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that holds the examples, on a machine without GPU and profile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr("autopar.planner.detect.detect_gpus", lambda: ())
    monkeypatch.setenv("AUTOPAR_PROFILE", str(tmp_path / "store.jsonl"))


def timeless(text: str) -> str:
    """The text without the seconds that the search took."""
    return re.sub(r"\d+\.\d s$", "0.0 s", text, flags=re.MULTILINE)


@pytest.mark.usefixtures("_elsewhere")
def test_the_session_prints_what_it_shows(capsys: pytest.CaptureFixture[str], update_golden: bool) -> None:
    assert invoke(shlex.split(COMMAND)[1:]) == 0
    printed = f"$ {COMMAND}\n{capsys.readouterr().out}"
    text = README.read_text()
    found = SESSION.search(text)
    assert found is not None
    if update_golden:
        README.write_text(text[: found.start()] + found[1] + printed + found[3] + text[found.end() :])
        return
    assert timeless(printed) == timeless(found[2])


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_code_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_every_file_named_in_backticks_or_links_exists() -> None:
    text = README.read_text()
    named = re.findall(r"`((?:autopar|examples|tests)/[\w/]+\.py)`", text) + re.findall(r"\]\(([\w./]+)\)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
