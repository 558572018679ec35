"""Running the command line in this process, and the small model files that tests plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autopar.cli.app import invoke

MODEL = """
import torch

def build_model(*, width: int = 8):
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.GELU(), torch.nn.Linear(width, 4))

def example_batch(*, batch: int = 8):
    return torch.zeros(batch, 4), torch.zeros(batch, dtype=torch.long)

def loss(output, batch):
    return torch.nn.functional.cross_entropy(output, batch[1])
"""


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Calls `autopar` in this process, in a directory of its own."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Outcome:
        self._capsys.readouterr()
        code = invoke(arguments)
        streams = self._capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    def write(self, name: str, text: str) -> str:
        (self.directory / name).write_text(text)
        return name
