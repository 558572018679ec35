"""What building a model depends on besides its options: the files that were read and the code that was imported.

`watch_files` runs while a model is built and traced. What it saw is kept as a `Manifest`, and a later run with an equal
manifest would build the same model. Files count by content. Packages in site-packages count by the size and time of
their first file, which an upgrade renews; the standard library counts by Python's version, autopar by its own hash.

Not seen, and so no reason to build again: environment variables that the model's code reads, files that it finds by
listing a directory, what it fetches from a network, the clock.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from autopar.resources import data_directory

ABSENT = "absent"
LIBRARY_PARTS = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Manifest:
    """Fingerprint by path: SHA-256 of the user's files, size and time of libraries' first files, or ABSENT."""

    files: dict[str, str]
    libraries: dict[str, str]

    def still_holds(self) -> bool:
        """Everything is as it was."""
        unchanged = all(_content(path) == known for path, known in self.files.items())
        return unchanged and all(_stamp(path) == known for path, known in self.libraries.items())


@dataclass
class FileWatch:
    """Collects what is read: content by path."""

    is_active: bool = False
    opened: dict[str, str] = field(default_factory=dict)

    def manifest(self) -> Manifest:
        """What was read, and all code that is imported by now."""
        imported = {path: _content(path) for path in _imported_files() if path not in self.opened}
        files = dict(sorted({**self.opened, **imported}.items()))
        return Manifest(files, {path: _stamp(path) for path in sorted(_first_files())})


@contextmanager
def watch_files() -> Iterator[FileWatch]:
    """Within the context, note every file that this process opens for reading, by its content at that time."""
    watch = FileWatch()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watch.is_active and event == "open":
            _note(watch, arguments)

    # An audit hook cannot be taken back; an inactive one costs a comparison per event.
    sys.addaudithook(hook)
    watch.is_active = True
    try:
        yield watch
    finally:
        watch.is_active = False


def _note(watch: FileWatch, arguments: tuple[Any, ...]) -> None:
    path, _, flags = arguments
    if not isinstance(path, str | bytes) or (flags or 0) & os.O_ACCMODE == os.O_WRONLY:
        return
    named = os.path.abspath(os.fsdecode(path))
    if named in watch.opened or _is_covered(named) or not _is_plain(named):
        return
    watch.is_active = False  # reading it is an event of its own
    watch.opened[named] = _content(named)
    watch.is_active = True


def _is_plain(path: str) -> bool:
    """A regular file, or nothing: code that looks for an optional file behaves differently once it exists."""
    return os.path.isfile(path) or not os.path.exists(path)


def _imported_files() -> list[str]:
    """Files of all imported modules that no version stands for."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return sorted({os.path.abspath(file) for file in files if isinstance(file, str) and not _is_covered(file)})


def _first_files() -> set[str]:
    """`__init__.py`, or the only file, of every imported top-level package of site-packages."""
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." not in name and isinstance(file, str) and _is_library(file):
            found.add(os.path.abspath(file))
    return found


def _is_library(path: str) -> bool:
    return any(part in LIBRARY_PARTS for part in Path(path).parts)


@cache
def _covered_directories() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    package = Path(__file__).resolve().parent.parent
    own = (package, data_directory("costmodels"), data_directory("profiles"))
    system = ("/proc/", "/sys/", "/dev/")
    return (*system, *(f"{Path(path)}{os.sep}" for path in (paths["stdlib"], paths["platstdlib"], *own)))


def _is_covered(path: str) -> bool:
    """Something else stands for the file: a version, a library's first file, autopar's own hash."""
    return path.endswith(".pyc") or _is_library(path) or path.startswith(_covered_directories())


def _content(path: str) -> str:
    """SHA-256 of the file, or ABSENT."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ABSENT


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return ABSENT
    return f"{status.st_size} {status.st_mtime_ns}"


@cache
def own_hash() -> str:
    """SHA-256 over autopar's own code and device files, so that an edit of either leaves no entry valid."""
    package = Path(__file__).resolve().parent.parent
    files = [*package.rglob("*.py"), *data_directory("costmodels").glob("*.json")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
