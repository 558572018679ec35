"""A machine with pretended boards that this process and all that it starts see as their NVML."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nvml_double import FakeBoard

ROOT = Path(__file__).parents[1]
DOUBLES = ROOT / "tests" / "doubles"


class Machine:
    """Boards in a file, and where states are kept."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "boards.json"
        self.states = directory / "states"

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which processes find it."""
        return {
            "FAKE_NVML": str(self.file),
            "AUTOPAR_STATE": str(self.states),
            "PYTHONPATH": f"{DOUBLES}{os.pathsep}{ROOT}",
        }

    def set(self, *boards: FakeBoard) -> None:
        """From now on it has these."""
        for index, board in enumerate(boards):
            board.index = index
        self.file.write_text(json.dumps([vars(board) for board in boards]))

    def boards(self) -> list[FakeBoard]:
        """As they are now."""
        return [FakeBoard(**content) for content in json.loads(self.file.read_text())]

    def settings(self) -> list[tuple[float | None, float, tuple[int, int]]]:
        """Locked clock, power limit and application clocks of each."""
        return [(board.locked_mhz, board.limit_w, tuple(board.application_mhz)) for board in self.boards()]

    def files(self) -> list[str]:
        """States."""
        return sorted(path.name for path in self.states.glob("*.json"))

    def is_clean(self) -> bool:
        """Whether nothing is set and no state is left."""
        return self.settings() == [(None, 400.0, (1593, 1410))] * len(self.boards()) and not self.files()


def make_machine(directory: Path, monkeypatch: pytest.MonkeyPatch, *boards: FakeBoard) -> Iterator[Machine]:
    """For fixtures."""
    found = Machine(directory)
    found.set(*boards)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    yield found
    sys.modules.pop("pynvml", None)
