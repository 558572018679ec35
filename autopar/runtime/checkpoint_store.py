"""A directory of checkpoints: one directory per step, written whole or not at all, and a pointer to the newest.

    latest                    "step_00000040"
    step_00000040/
        manifest.json         what is where: every tensor with shape, dtype, and its chunks in the files
        rank_00000.safetensors, rank_00001.safetensors, ...

Ranks write into `step_N.partial`; the first of them writes the manifest, makes everything durable and renames. Whatever
is killed at whatever moment, each `step_N` is complete. Nothing here is code: the manifest is strict JSON, names of
files are matched against one pattern, and links are not followed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import InputError
from autopar.ir.codec import DecodeError, decode, encode, format_json, parse_json
from autopar.ir.serialize import write_atomic
from autopar.runtime.tensor_files import DTYPES, size_of

FORMAT = "autopar-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL = ".partial"
_STEP = re.compile(r"step_([0-9]{8,18})")
_FILE = re.compile(r"rank_[0-9]{5,9}\.safetensors")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it lies in the tensor, and where its bytes lie in which file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    crc32: int


@dataclass(frozen=True)
class StoredTensor:
    """One whole tensor; its chunks do not overlap and cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Position:
    """Where training stands, apart from tensors.

    Attributes:
        step: optimizer steps done; batches 0..step-1 have been seen. Random streams are functions of it.
        seed: of weights and random streams; `data_seed` of the order of samples.
        batch_size: samples in a global batch.
        optimizer: kind; "" where the checkpoint holds no optimizer (imported weights).
        num_gpus: that wrote it.
        source, graph_hash: of the model, as the plan names it.
    """

    step: int
    seed: int
    data_seed: int
    batch_size: int
    optimizer: str
    num_gpus: int
    source: str
    graph_hash: str


@dataclass(frozen=True)
class Checkpoint:
    """Content of a manifest.

    Attributes:
        files: bytes by name.
        tensors: by `parameter/NAME`, `buffer/NAME` or `optimizer/NAME/STATE`, names as in the model's `state_dict`.
        aliases: further name of a shared parameter -> the name it is stored under.
    """

    format: str
    version: int
    position: Position
    files: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def read_manifest(directory: Path) -> Checkpoint:
    """What a checkpoint's directory holds, held against the files that are there.

    Raises:
        InputError: no checkpoint, a damaged one, or one that points out of its directory.
    """
    path = directory / MANIFEST
    try:
        if path.is_symlink():
            raise InputError(f"{path}: is a link; a checkpoint holds its files itself")
        found: Checkpoint = decode(parse_json(path.read_text(encoding="utf-8")), Checkpoint, {})
    except FileNotFoundError as error:
        raise InputError(f"{directory}: no checkpoint there ({MANIFEST} is missing)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except (DecodeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged or no checkpoint: {error}") from error
    if (found.format, found.version) != (FORMAT, VERSION):
        raise InputError(f"{path}: {found.format} version {found.version}; this autopar reads {FORMAT} {VERSION}")
    _check_files(directory, found)
    for name, tensor in found.tensors.items():
        _check_tensor(path, name, tensor, found.files)
    return found


def _check_files(directory: Path, found: Checkpoint) -> None:
    for name, size in found.files.items():
        path = directory / name
        if not _FILE.fullmatch(name):
            raise InputError(f"{directory / MANIFEST}: {name!r} is no name of a file of a checkpoint")
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path}: missing; the checkpoint is incomplete")
        if path.stat().st_size != size:
            raise InputError(f"{path}: truncated or changed: {path.stat().st_size} bytes, written were {size}")


def _check_tensor(path: Path, name: str, tensor: StoredTensor, files: Mapping[str, int]) -> None:
    """Chunks lie within the tensor and within their files."""
    if tensor.dtype not in DTYPES or any(size < 0 for size in tensor.shape):
        raise InputError(f"{path}: {name}: bad dtype {tensor.dtype!r} or shape {tensor.shape}")
    for chunk in tensor.chunks:
        corners = list(zip(chunk.offsets, chunk.shape, tensor.shape, strict=False))
        fits = len(chunk.offsets) == len(chunk.shape) == len(tensor.shape)
        fits = fits and all(o >= 0 and n >= 0 and o + n <= whole for o, n, whole in corners)
        if not fits or chunk.begin < 0 or chunk.begin + size_of(tensor.dtype, chunk.shape) > files.get(chunk.file, -1):
            raise InputError(f"{path}: {name}: a chunk at {chunk.offsets} lies outside the tensor or its file")


class CheckpointStore:
    """The checkpoints under one directory."""

    def __init__(self, root: Path, keep: int = 3) -> None:
        """Name it; nothing is made yet. `keep` >= 1: how many of the newest stay."""
        if keep < 1:
            raise InputError(f"at least one checkpoint must be kept, got {keep}")
        self.root, self.keep = root, keep

    def path(self, step: int) -> Path:
        return self.root / step_name(step)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first, damaged ones included."""
        if not self.root.is_dir():
            return []
        found = ((_STEP.fullmatch(path.name), path) for path in self.root.iterdir())
        return sorted(int(m[1]) for m, path in found if m and path.is_dir() and not path.is_symlink())

    def whole(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Directories of checkpoints whose files are all there, the newest first; and a line for each that is not."""
        found, remarks = [], []
        pointed = self._pointed()
        for step in sorted(self.steps(), key=lambda step: (step == pointed, step), reverse=True):
            try:
                read_manifest(self.path(step))
            except InputError as error:
                remarks.append(f"passed over: {error}")
                continue
            found.append(str(self.path(step)))
        return tuple(found), tuple(remarks)

    def latest(self) -> int | None:
        """Step of the newest one whose files are all there."""
        found, _ = self.whole()
        return read_manifest(Path(found[0])).position.step if found else None

    def _pointed(self) -> int | None:
        try:
            match = _STEP.fullmatch((self.root / LATEST).read_text(encoding="ascii").strip())
        except (OSError, UnicodeDecodeError):
            return None
        return int(match[1]) if match else None

    def begin(self, step: int) -> None:
        """Make an empty directory to write into; what an earlier attempt left goes."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for left in self.root.glob(f"step_*{PARTIAL}"):
                shutil.rmtree(left)
            self.partial(step).mkdir()
        except OSError as error:
            raise InputError(f"{self.root}: cannot write checkpoints there: {error.strerror}") from error

    def partial(self, step: int) -> Path:
        """Where ranks write."""
        return self.root / f"{step_name(step)}{PARTIAL}"

    def commit(self, step: int, checkpoint: Checkpoint) -> Path:
        """After all ranks have written: the manifest, the rename, the pointer; then old ones go."""
        partial, final = self.partial(step), self.path(step)
        write_durably(partial / MANIFEST, format_json(encode(checkpoint, Checkpoint, {})))
        sync_directory(partial)
        if final.exists():  # of a run that was taken up again before this step
            aside = self.root / f"{step_name(step)}.old{PARTIAL}"
            final.rename(aside)
        partial.rename(final)
        sync_directory(self.root)
        write_durably(self.root / LATEST, f"{step_name(step)}\n")
        self._drop_old(step)
        return final

    def _drop_old(self, newest: int) -> None:
        """Keep the newest ones up to this step; later ones belong to a course that was given up."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self.keep :]
        for step in set(steps) - set(kept):
            # Renamed first: half a directory must not look like a checkpoint.
            aside = self.root / f"{step_name(step)}.gone{PARTIAL}"
            self.path(step).rename(aside)
            shutil.rmtree(aside)
        for left in self.root.glob(f"step_*.old{PARTIAL}"):
            shutil.rmtree(left)


def write_durably(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk when it returns."""
    write_atomic(path, text)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
