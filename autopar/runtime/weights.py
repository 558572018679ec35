"""Weights outside checkpoints: to and from files of a plain `state_dict`, in one process, without an executor."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.runtime.checkpoint import read_whole
from autopar.runtime.checkpoint_store import (
    FORMAT,
    VERSION,
    Checkpoint,
    CheckpointStore,
    Chunk,
    Position,
    StoredTensor,
    file_name,
    read_manifest,
)
from autopar.runtime.tensor_files import DTYPES, Planned, TensorFile, dtype_name, write_tensors

KINDS = ("parameter/", "buffer/")


def export_weights(directory: Path, target: Path) -> int:
    """Write parameters and buffers of a checkpoint as a `state_dict`, shared ones under each of their names.

    Args:
        directory: of the checkpoint.
        target: `*.safetensors`, or `*.pt` for `torch.load(..., weights_only=True)`.

    Returns:
        How many tensors were written.

    Raises:
        InputError: a damaged checkpoint, or another ending.
    """
    checkpoint = read_manifest(directory)
    names = {name.partition("/")[2]: name for name in checkpoint.tensors if name.startswith(KINDS)}
    names |= {alias: names[name] for alias, name in checkpoint.aliases.items() if name in names}
    if target.suffix == ".safetensors":
        planned = {name: _planned(directory, checkpoint, stored) for name, stored in names.items()}
        with _whole_or_not(target) as partial:
            write_tensors(partial, planned)
        return len(names)
    if target.suffix != ".pt":
        raise InputError(f"{target}: give a name that ends in .safetensors or .pt")
    tensors = dict(read_whole(directory, checkpoint, sorted(set(names.values()))))
    with _whole_or_not(target) as partial:
        torch.save({name: tensors[stored] for name, stored in sorted(names.items())}, partial)
    return len(names)


def _planned(directory: Path, checkpoint: Checkpoint, name: str) -> Planned:
    stored = checkpoint.tensors[name]

    def make() -> Tensor:
        ((_, tensor),) = read_whole(directory, checkpoint, [name])
        return tensor

    return Planned(DTYPES[stored.dtype], stored.shape, make)


@contextmanager
def _whole_or_not(target: Path) -> Iterator[Path]:
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def import_weights(
    sources: Sequence[Path],
    store: CheckpointStore,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    start: Position,
) -> int:
    """Write a checkpoint at step 0, without an optimizer, from files of a `state_dict`.

    Args:
        sources: `.safetensors`, or what `torch.save` wrote of tensors by name.
        store: in which there is no checkpoint yet.
        shapes: of what the model needs, by `parameter/NAME` and `buffer/NAME`; buffers may be absent.
        aliases: further name -> name, see `Checkpoint`.
        start: of the run that will take it up.

    Returns:
        How many tensors of the files the model has no use for.

    Raises:
        InputError: a file is no such thing, or lacks a parameter, or there is a checkpoint already.
    """
    if store.steps():
        raise InputError(f"{store.root}: holds checkpoints already; give another directory")
    found = _read_all(sources)
    found |= {name: found[alias] for alias, name in aliases.items() if alias in found and name not in found}
    chosen: dict[str, Planned] = {}
    for name, shape in shapes.items():
        kind, _, fqn = name.partition("/")
        if fqn not in found and kind == "parameter":
            raise InputError(f"{sources[0]}: the model's parameter {fqn} is not in it")
        if fqn in found:
            tensor = found[fqn]
            if tuple(tensor.shape) != shape:
                raise InputError(f"{sources[0]}: {fqn} has shape {tuple(tensor.shape)}, the model's has {shape}")
            chosen[name] = Planned(tensor.dtype, shape, lambda tensor=tensor: tensor)  # type: ignore[misc]
    store.begin(0)
    written = write_tensors(store.partial(0) / file_name(0), chosen)
    tensors = {
        name: StoredTensor(e.dtype, e.shape, (Chunk((0,) * len(e.shape), e.shape, file_name(0), e.begin, checksum),))
        for name, (e, checksum) in written.items()
    }
    files = {file_name(0): (store.partial(0) / file_name(0)).stat().st_size}
    position = replace(start, step=0, optimizer="", num_gpus=1)
    store.commit(0, Checkpoint(FORMAT, VERSION, position, files, tensors, dict(aliases)))
    used = {name.partition("/")[2] for name in chosen}
    return sum(name not in used and aliases.get(name) not in used for name in found)


def _read_all(sources: Sequence[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for source in sources:
        tensors = _read_safetensors(source) if source.suffix == ".safetensors" else _read_saved(source)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise InputError(f"{source}: {twice[0]} stands in another of the files, too")
        found |= tensors
    return found


def _read_safetensors(source: Path) -> dict[str, Tensor]:
    file = TensorFile(source)
    return {name: file.read(entry) for name, entry in file.entries.items()}


def _read_saved(source: Path) -> dict[str, Tensor]:
    """`torch.load` that builds tensors and containers and nothing else."""
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{source}: no tensors by name that can be read without executing code: {first}") from None
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise InputError(f"{source}: no state_dict: expected tensors by name")
    for name, tensor in found.items():
        dtype_name(tensor.dtype)
        if not isinstance(name, str):
            raise InputError(f"{source}: no state_dict: {name!r} is no name")
    return dict(found)
