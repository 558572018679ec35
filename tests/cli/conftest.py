"""The `cli` fixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import MODEL, Cli


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("plan", "model.py", ...)` in an empty directory that holds `model.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOPAR_PROFILE", str(tmp_path / "store.jsonl"))
    made = Cli(tmp_path, capsys)
    made.write("model.py", MODEL)
    return made
