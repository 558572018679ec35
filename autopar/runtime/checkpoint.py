"""Checkpoints of an executor by `torch.distributed.checkpoint` (DCP), without its pickles.

DCP plans who writes and who reads what, leaves out copies, and re-shards: its planners and its `save`, `async_save` and
`load` are used as they are. Its own file system storage keeps its metadata as a pickle (torch 2.11 to 2.13: read with
`pickle.load`, which executes what a file says), so the storage here is another: `tensor_files` and `checkpoint_store`.

Names and boxes do not depend on the plan: a tensor has the name of the model's `state_dict` and global offsets. So a
checkpoint loads under any plan and number of ranks; under the same plan every bit comes back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from autopar.errors import InputError
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
from autopar.runtime.executor import Executor
from autopar.runtime.parameters import StoredParameter
from autopar.runtime.tensor_files import DTYPES, Entry, Planned, TensorFile, dtype_name, size_of, write_tensors


@dataclass(frozen=True)
class Part:
    """This rank's box of a tensor: `local` shares memory with the executor."""

    local: Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)


def parts_of(executor: Executor) -> dict[str, Part]:
    """Everything of this rank that training changes, by its name in a checkpoint.

    Buffers that no stage updates are kept too, so that a checkpoint is a whole `state_dict`.
    """
    found: dict[str, Part] = {}
    for item in executor.store.items.values():
        found[f"parameter/{item.value.fqn}"] = _part(executor, item, executor.updated_value(item))
        for state, tensor in sorted(executor.optimizer.state.get(item.updated, {}).items()):
            if isinstance(tensor, Tensor):
                is_count = tensor.dim() == 0 and item.updated.dim() > 0
                box = Part(tensor, (), ()) if is_count else _part(executor, item, tensor.detach())
                found[f"optimizer/{item.value.fqn}/{state}"] = box
    updated = {name for op in executor.graph.ops for name in op.mutates}
    buffers, own = executor.buffers, set(executor.updated_buffers)
    for value in executor.graph.outside("buffer"):
        if value.name in buffers and (value.name in own or value.name not in updated):
            tensor = buffers[value.name]
            found[f"buffer/{value.fqn}"] = Part(tensor, (0,) * tensor.dim(), tuple(tensor.shape))
    return found


def _part(executor: Executor, item: StoredParameter, local: Tensor) -> Part:
    """The box of a parameter's optimizer placement: the cuts of its storage, then those of zero1."""
    whole = tuple(item.value.meta.shape)
    offsets, sizes = [0] * len(whole), list(whole)
    for axis, dim in (*item.storage_cuts, *item.optimizer_cuts):
        group = executor.mesh.axes[axis]
        sizes[dim] //= group.size
        offsets[dim] += sizes[dim] * group.index
    assert tuple(local.shape) == tuple(sizes), (item.value.fqn, local.shape, sizes)
    return Part(local, tuple(offsets), whole)


def _own_parts(executor: Executor) -> dict[str, Part]:
    """What this rank writes: stages on meshes of their own cut what they share otherwise; there the first writes it."""
    parts, mesh = parts_of(executor), executor.mesh
    others = [i.value.fqn for i in executor.store.items.values() if mesh.meshes and i.tied and i.tied[0] != mesh.stage]
    left_out = {(kind, fqn) for kind in ("parameter", "optimizer") for fqn in others}
    return {name: part for name, part in parts.items() if tuple(name.split("/")[:2]) not in left_out}


class Saver:
    """Saves checkpoints of one executor, at once or while training goes on."""

    def __init__(self, store: CheckpointStore, aliases: Mapping[str, str], *, is_async: bool = False) -> None:
        """Every rank must make one.

        Args:
            store: where.
            aliases: of the model, see `Checkpoint`.
            is_async: `save` copies the tensors and returns; a thread writes them.
        """
        self._store, self._aliases = store, dict(aliases)
        self._is_distributed = dist.is_initialized() and dist.get_world_size() > 1
        # Of its own, on the CPU: a thread's collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if self._is_distributed else None
        self._is_async = is_async
        self._pending: Any = None

    def save(self, executor: Executor, position: Position) -> None:
        """Write a checkpoint; every rank must call. What the last call left to do is finished first."""
        self.finish()
        parts = _own_parts(executor)
        writer = _Writer(self._store, replace(position, num_gpus=_world()), self._aliases)
        tensors = {name: part.local for name, part in parts.items()}
        settings: dict[str, Any] = {"storage_writer": writer, "process_group": self._group}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            if not self._is_async:
                dcp_save(tensors, planner=_SavePlanner(parts), no_dist=not self._is_distributed, **settings)
                return
            staged = {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
            parts = {name: replace(part, local=staged[name]) for name, part in parts.items()}
            settings["async_stager"] = _Staged()
            self._pending = dcp_async_save(
                staged, planner=_SavePlanner(parts), no_dist=not self._is_distributed, **settings
            )

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            assert isinstance(pending, ThreadFuture)
            pending.result()


def load(executor: Executor, directory: Path) -> Position:
    """Load a checkpoint into the executor, whatever plan wrote it; every rank must call.

    Raises:
        InputError: damaged, of another model, or with the state of another optimizer.
    """
    checkpoint = read_manifest(directory)
    kind = checkpoint.position.optimizer
    if kind and kind != executor.options.optimizer.kind:
        ours = executor.options.optimizer.kind
        raise InputError(f"{directory}: holds the state of the optimizer {kind}, this run updates with {ours}")
    if kind:
        _make_optimizer_state(executor, checkpoint)
    parts = parts_of(executor)
    if not kind:  # weights from elsewhere, where some buffers may be missing: the model has made its own
        parts = {n: p for n, p in parts.items() if n in checkpoint.tensors or not n.startswith("buffer/")}
    _check_same_tensors(directory, checkpoint, parts, executor)
    reader = _Reader(directory, checkpoint)
    is_distributed = dist.is_initialized() and dist.get_world_size() > 1
    tensors = {name: part.local for name, part in parts.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp_load(tensors, storage_reader=reader, planner=_LoadPlanner(parts), no_dist=not is_distributed)
        except CheckpointException as error:
            cause = next((e for e, _ in error.failures.values() if isinstance(e, InputError)), None)
            raise cause or error from error
    executor.refresh_leaves()
    if executor.mesh.pipeline is not None and any(op.mutates for op in executor.graph.ops):
        executor.sync_buffers()
    for program in executor.programs:
        for stream in program.streams:
            stream.step = checkpoint.position.step
    return checkpoint.position


def _make_optimizer_state(executor: Executor, checkpoint: Checkpoint) -> None:
    """Empty state where the checkpoint has some; the optimizer would make its own at its first step."""
    names: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if name.startswith("optimizer/"):
            fqn, _, state = name.removeprefix("optimizer/").rpartition("/")
            names.setdefault(fqn, []).append(state)
    # torch's optimizers count steps in float32: on the parameter's device if the update is one kernel, else on the CPU.
    group = executor.optimizer.param_groups[0]
    counts_on = executor.options.device if group.get("fused") or group.get("capturable") else "cpu"
    for item in executor.store.items.values():
        for state in names.get(item.value.fqn, ()):
            stored = checkpoint.tensors[f"optimizer/{item.value.fqn}/{state}"]
            is_count = not stored.shape and item.updated.dim() > 0
            made = torch.zeros((), device=counts_on) if is_count else executor.empty_state(item, state)
            executor.optimizer.state[item.updated][state] = made.detach()


def _check_same_tensors(directory: Path, checkpoint: Checkpoint, parts: Mapping[str, Part], executor: Executor) -> None:
    known = {f"parameter/{value.fqn}": tuple(value.meta.shape) for value in executor.graph.parameters}
    extra = sorted(n for n in checkpoint.tensors if n.startswith("parameter/") and n not in known)
    if extra:
        raise InputError(f"{directory}: of another model: it has {extra[0]}, which this model has not")
    for name, part in parts.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            raise InputError(f"{directory}: of another model: {name} is not in it")
        if stored.shape != part.whole:
            raise InputError(f"{directory}: of another model: {name} has shape {stored.shape}, here {part.whole}")


class _Staged:
    """What DCP calls a stager, for tensors that are copies already."""

    should_synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def synchronize_staging(self) -> None:
        return

    def close(self) -> None:
        return


class _SavePlanner(DefaultSavePlanner):
    """DCP's own planner over boxes that the executor knows, in place of those that it would ask DTensor for."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, part in self._parts.items():
            properties = TensorProperties(dtype=part.local.dtype)
            data = TensorWriteData(part.chunk, properties, torch.Size(part.whole))
            index = MetadataIndex(name, torch.Size(part.offsets))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn].local


class _LoadPlanner(DefaultLoadPlanner):
    """The reverse of `_SavePlanner`."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, part in self._parts.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [part.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn].local


class _Writer(StorageWriter):
    """Each rank's boxes in one file, and a manifest."""

    def __init__(self, store: CheckpointStore, position: Position, aliases: Mapping[str, str]) -> None:
        self._store, self._position, self._aliases = store, position, aliases

    def reset(self, checkpoint_id: Any = None) -> None:
        """The directory follows from the step."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The first rank empties the directory, before any rank learns what to write."""
        if is_coordinator:
            self._store.begin(self._position.step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=file_name(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(list(self._write(plan, planner)))
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> Iterator[WriteResult]:
        if not plan.items:
            return
        wanted = {_key(item): item for item in plan.items}
        tensors = {key: _planned(item, planner) for key, item in wanted.items()}
        path = self._store.partial(self._position.step) / plan.storage_data
        written = write_tensors(path, tensors)
        for key, item in wanted.items():
            entry, checksum = written[key]
            yield WriteResult(item.index, entry.size_bytes, (plan.storage_data, entry.begin, checksum))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The first rank, once all have written."""
        where = {result.index: result.storage_data for group in results for result in group}
        tensors = {}
        for name, stored in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(stored, TensorStorageMetadata)
            boxes = [(MetadataIndex(name, chunk.offsets, i), chunk) for i, chunk in enumerate(stored.chunks)]
            chunks = (Chunk(tuple(c.offsets), tuple(c.sizes), *where[index]) for index, c in boxes)
            tensors[name] = StoredTensor(dtype_name(stored.properties.dtype), tuple(stored.size), tuple(chunks))
        directory = self._store.partial(self._position.step)
        files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
        checkpoint = Checkpoint(FORMAT, VERSION, self._position, files, tensors, self._aliases)
        self._store.commit(self._position.step, checkpoint)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


def _key(item: WriteItem) -> str:
    """Name of a box in its file: that of the tensor, and where it begins unless it is the whole."""
    assert item.tensor_data is not None
    is_whole = item.tensor_data.chunk.sizes == item.tensor_data.size
    offsets = ",".join(str(offset) for offset in item.tensor_data.chunk.offsets)
    return item.index.fqn if is_whole else f"{item.index.fqn}@{offsets}"


def _planned(item: WriteItem, planner: SavePlanner) -> Planned:
    def make() -> Tensor:
        found = planner.resolve_data(item)
        assert isinstance(found, Tensor)
        return found

    assert item.tensor_data is not None
    return Planned(item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes), make)


class _Reader(StorageReader):
    """Boxes of a checkpoint, each held against its checksum when it is read."""

    def __init__(self, directory: Path, checkpoint: Checkpoint) -> None:
        self._directory, self._checkpoint = directory, checkpoint
        self._files: dict[str, TensorFile] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Everything is given at the start."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _metadata(tensor) for name, tensor in self._checkpoint.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            stored = self._checkpoint.tensors[item.storage_index.fqn]
            index = item.storage_index.index
            assert index is not None
            box = _read_chunk(self._directory, stored, stored.chunks[index], self._files)
            for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                box = box.narrow(dim, start, size)
            target = planner.resolve_tensor(item).detach()
            target.copy_(box)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


def _metadata(tensor: StoredTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[tensor.dtype]), torch.Size(tensor.shape), chunks)


def _read_chunk(directory: Path, tensor: StoredTensor, chunk: Chunk, files: dict[str, TensorFile]) -> Tensor:
    if chunk.file not in files:
        files[chunk.file] = TensorFile(directory / chunk.file)
    entry = Entry(tensor.dtype, chunk.shape, chunk.begin, size_of(tensor.dtype, chunk.shape))
    return files[chunk.file].read(entry, chunk.crc32)


def read_whole(directory: Path, checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors in one process, one after the other. Raises InputError for damage."""
    files: dict[str, TensorFile] = {}
    for name in names:
        stored = checkpoint.tensors[name]
        whole = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        for chunk in stored.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.shape, strict=True))
            whole[box] = _read_chunk(directory, stored, chunk, files)
        yield name, whole


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
