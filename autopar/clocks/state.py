"""What a run has set on boards and what was there before: files that outlive the run and everybody who watches it.

A file is written before the first setting is touched and removed after the last is restored. `touched` names a setting
before it is set, so that a kill at any moment leaves nothing out. Settings do not survive a reboot, and neither does
the meaning of a file: it knows the boot that it was written in.

Owners are known by process id and start time, since ids are used again, and by the namespace of process ids: a process
of another container cannot be seen from here, and counts as alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autopar.errors import InputError

STATE_VARIABLE = "AUTOPAR_STATE"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")
LOCKED, APPLICATION, LIMIT = "locked clock", "application clocks", "power limit"
SETTINGS = (LOCKED, APPLICATION, LIMIT)


@dataclass(frozen=True, slots=True)
class SavedBoard:
    """One board before a run.

    Attributes:
        uuid, index: of the board, as NVML has them.
        application_mhz: (memory, SM) application clocks; None: the board has none.
        limit_w: power limit; None: the board tells none.
        touched: of SETTINGS, those that the run has set or is about to. Locked clocks cannot be read, so there is no
            earlier value of them to go back to.
    """

    uuid: str
    index: int
    application_mhz: tuple[float, float] | None
    limit_w: float | None
    touched: tuple[str, ...] = ()

    def with_touched(self, setting: str) -> SavedBoard:
        """The same after (or just before) a setting was set."""
        return replace(self, touched=tuple(dict.fromkeys((*self.touched, setting))))

    def without(self, setting: str) -> SavedBoard:
        """The same after a setting turned out not to be ours to set, or was restored."""
        return replace(self, touched=tuple(name for name in self.touched if name != setting))


@dataclass(frozen=True)
class State:
    """One run's file."""

    path: Path
    boot: str
    namespace: str
    owner: int
    owner_started: str
    boards: tuple[SavedBoard, ...]

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the settings can still be there."""
        return self.boot == boot_id()

    @property
    def is_visible(self) -> bool:
        """Whether the run's process could be seen from here."""
        return self.namespace == namespace_id()

    @property
    def is_owned(self) -> bool:
        """Whether the run still lives, as far as can be seen."""
        return self.is_of_this_boot and not (self.is_visible and started_at(self.owner) != self.owner_started)

    def write(self) -> None:
        """As a whole or not at all. Raises InputError."""
        content = asdict(replace(self, path=Path()))
        del content["path"]
        try:
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written, so nothing was set: {error}") from error


def state_directory() -> Path:
    """`$AUTOPAR_STATE`, else `autopar/clocks` below `$XDG_STATE_HOME` or `~/.local/state`."""
    named = os.environ.get(STATE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "autopar" / "clocks"


def new_state(directory: Path, boards: tuple[SavedBoard, ...]) -> State:
    """Of this process; not yet written."""
    owner = os.getpid()
    name = f"{owner}-{started_at(owner)}.json"
    return State(directory / name, boot_id(), namespace_id(), owner, started_at(owner), boards)


def read_states(directory: Path) -> list[State]:
    """All files of a directory, by name. Raises InputError for one that is no such file."""
    return [read_state(path) for path in sorted(directory.glob("*.json"))] if directory.is_dir() else []


def read_state(path: Path) -> State:
    """One file. Raises InputError if it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        boards = tuple(_board(entry) for entry in content["boards"])
        where = str(content["boot"]), str(content["namespace"])
        return State(path, *where, int(content["owner"]), str(content["owner_started"]), boards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold the settings of a run ({error}); remove it by hand") from error


def _board(content: dict[str, Any]) -> SavedBoard:
    clocks, limit = content["application_mhz"], content["limit_w"]
    touched = tuple(content["touched"])
    if not set(touched) <= set(SETTINGS):
        raise ValueError(f"unknown settings {touched}")
    return SavedBoard(
        str(content["uuid"]),
        int(content["index"]),
        None if clocks is None else (float(clocks[0]), float(clocks[1])),
        None if limit is None else float(limit),
        touched,
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time looks at states and makes one. Raises InputError if the directory cannot be used."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (directory / "lock").open("w")
    except OSError as error:
        raise InputError(f"{directory} cannot be written (set {STATE_VARIABLE}): {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def boot_id() -> str:
    """Of this machine since it was started; "" where the system does not tell."""
    return BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.is_file() else ""


def namespace_id() -> str:
    """Of the process ids that this process sees; "" where the system does not tell."""
    try:
        return os.readlink(NAMESPACE)
    except OSError:
        return ""


def started_at(pid: int) -> str:
    """Start time of a process in clock ticks since boot, as text; "" if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]
