"""Feed: the batches of a run, step by step, made ahead of their use by a thread or by loader processes.

Which samples a step trains on depends on the step, the seed and the batch size alone: sample `i` of step `s` is entry
`(s * B + i) % n` of that epoch's permutation. So any number of devices sees the same data in the same order, and a
run that is taken up at step `s` goes on as if it had not stopped. A rank loads the samples that it computes with, and
leaves the others of the batch zero. What a dataset draws at random for a sample is a function of the sample's position
in the run, too: `torch`, `random` and `numpy.random` are seeded before each.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate
from torch.utils.data import Dataset as Samples

from autopar import torch_adapter
from autopar.errors import InputError

AHEAD = 2
"""Batches that are made before they are asked for (per loader process, where there are some)."""


INPUT_BINDS = 0.05
"""Share of the time of steps, spent waiting for batches, from which on the run says so."""


@dataclass(frozen=True)
class Order:
    """Which samples each step has; see the module docstring.

    Attributes:
        num_samples: of the dataset.
        batch_size: of the whole batch.
        shuffles: each epoch in another order; else in the dataset's own.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffles: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise InputError("the dataset has no samples")

    def samples(self, step: int, rows: Sequence[int]) -> list[tuple[int, int]]:
        """(position in the run, index into the dataset) of some rows of a step's batch."""
        found = []
        for row in rows:
            position = step * self.batch_size + row
            epoch, place = divmod(position, self.num_samples)
            order = _permutation(self.num_samples, self.seed, epoch) if self.shuffles else range(self.num_samples)
            found.append((position, int(order[place])))
        return found


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, "epoch", epoch)))


def _seed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Form:
    """The batch that an executor takes.

    Attributes:
        shapes, dtypes: of each tensor of the whole batch, in graph order.
        dims: that count samples; None: the tensor is the same in every batch, and `fixed` holds it.
        rows: of the batch that this rank computes with; () for a rank that reads no input.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[int | None, ...]
    fixed: tuple[Tensor, ...]
    rows: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """Samples of a whole batch."""
        return next((shape[dim] for shape, dim in zip(self.shapes, self.dims, strict=True) if dim is not None), 0)

    def spread(self, leaves: Sequence[Tensor], text: str) -> list[Tensor]:
        """Tensors of `rows` at their places in whole batches, zero elsewhere. Raises InputError for other tensors."""
        if len(leaves) != len(self.shapes):
            raise InputError(
                f"{text}: a batch has {len(leaves)} tensors, that of example_batch() has {len(self.shapes)}"
            )
        made = []
        index = torch.tensor(self.rows)
        for i, leaf in enumerate(leaves):
            dim = self.dims[i]
            if dim is None:
                made.append(self.fixed[i])
                continue
            expected = tuple(len(self.rows) if d == dim else size for d, size in enumerate(self.shapes[i]))
            if tuple(leaf.shape) != expected or leaf.dtype != self.dtypes[i]:
                whole = f"{tuple(self.shapes[i])} of {self.dtypes[i]}"
                raise InputError(
                    f"{text}: tensor {i} of {len(self.rows)} samples has shape {tuple(leaf.shape)} and {leaf.dtype}; "
                    f"the plan was made for batches of {whole}"
                )
            if len(self.rows) == self.shapes[i][dim]:
                made.append(leaf)
            else:
                made.append(torch.zeros(self.shapes[i], dtype=self.dtypes[i]).index_copy_(dim, index, leaf))
        return made

    def empty(self) -> list[Tensor]:
        """For a rank that reads no input: whole batches without memory of their own."""
        pairs = enumerate(zip(self.shapes, self.dtypes, strict=True))
        return [
            self.fixed[i] if self.dims[i] is None else torch.zeros((), dtype=dtype).expand(shape)
            for i, (shape, dtype) in pairs
        ]


class Feed:
    """Batches from a step on, in order: an iterator without an end."""

    def __init__(self, batches: Iterator[list[Tensor]], *, ahead: int = AHEAD) -> None:
        """Start to make batches; `ahead` 0: only when they are asked for."""
        self._batches = batches
        self._waited_s, self._is_warm = 0.0, False
        self._queue: queue.Queue[list[Tensor] | BaseException] | None = queue.Queue(ahead) if ahead else None
        self._is_closed = threading.Event()
        if ahead:
            threading.Thread(target=self._fill, daemon=True, name="feed").start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> list[Tensor]:
        """The next step's batch. Raises what the dataset raised."""
        started = time.perf_counter()
        found = next(self._batches) if self._queue is None else self._queue.get()
        if self._is_warm:
            self._waited_s += time.perf_counter() - started
        self._is_warm = True  # for the first batch every run waits
        if isinstance(found, BaseException):
            raise found
        return found

    def remarks(self, total_s: float) -> tuple[str, ...]:
        """Whether the input binds, given the seconds of all steps so far: on the rank that waited longest.

        Every rank must call.
        """
        waited = torch.tensor(self._waited_s, dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(waited, dist.ReduceOp.MAX)
        share = float(waited) / total_s if total_s else 0.0
        if share < INPUT_BINDS:
            return ()
        return (
            f"the input binds: {share:.0%} of the time of the steps went by waiting for batches (measured, slowest "
            "rank); --data-workers N makes them in N processes per rank",
        )

    def close(self) -> None:
        """Make no more batches."""
        self._is_closed.set()

    def _fill(self) -> None:
        assert self._queue is not None
        try:
            for batch in self._batches:
                if not self._put(batch):
                    return
            self._put(InputError("the dataset has no more batches"))
        except Exception as error:  # handed to the thread that asks for a batch
            self._put(error)

    def _put(self, item: list[Tensor] | BaseException) -> bool:
        assert self._queue is not None
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


@dataclass(frozen=True)
class Dataset:
    """What a model file's `dataset()` returned, taken apart.

    Attributes:
        data: of samples, by index or (an `IterableDataset`) in order.
        collate: samples to a batch.
        shuffles: see `Order`.
        num_workers: loader processes per rank.
        text: the file, for messages.
    """

    data: Any
    collate: Callable[[list[Any]], Any]
    shuffles: bool
    num_workers: int
    text: str

    @property
    def is_stream(self) -> bool:
        return isinstance(self.data, IterableDataset)


def open_dataset(found: Any, text: str, num_workers: int | None = None) -> Dataset:
    """Read what `dataset()` returned: a dataset, a sequence of samples, or a `DataLoader` around one.

    Of a loader count its dataset, its collation, its number of workers, and whether it shuffles; batches and their
    order are the run's own.

    Raises:
        InputError: anything else, or a loader whose sampler has an order of its own.
    """
    if not isinstance(found, DataLoader):
        has_items = hasattr(found, "__getitem__") and hasattr(found, "__len__")
        if not has_items and not isinstance(found, IterableDataset):
            raise InputError(
                f"{text}: dataset() must return a Dataset, a sequence or a DataLoader, not {type(found).__name__}"
            )
        return Dataset(found, default_collate, not isinstance(found, IterableDataset), num_workers or 0, text)
    is_stream = isinstance(found.dataset, IterableDataset)
    shuffles = isinstance(found.sampler, RandomSampler)
    if not is_stream and not shuffles and not isinstance(found.sampler, SequentialSampler):
        raise InputError(
            f"{text}: the loader of dataset() samples by {type(found.sampler).__name__}, whose order cannot be taken "
            "up again; return a DataLoader with shuffle=True or False, or the dataset alone"
        )
    workers = found.num_workers if num_workers is None else num_workers
    return Dataset(found.dataset, found.collate_fn, shuffles and not is_stream, workers, text)


def batches_of(dataset: Dataset, form: Form, batch_size: int, seed: int, first_step: int) -> Iterator[list[Tensor]]:
    """Batches from `first_step` on, for ever. Raises InputError for samples that make no batch of the plan's."""
    if not form.rows:
        while True:
            yield form.empty()
    if dataset.is_stream:
        yield from _streamed(dataset, form, batch_size, first_step)
        return
    order = Order(len(dataset.data), batch_size, seed, dataset.shuffles)
    steps = (order.samples(step, form.rows) for step in itertools.count(first_step))
    if dataset.num_workers == 0:
        samples = _Seeded(dataset.data, seed)
        for wanted in steps:
            yield form.spread(_leaves(dataset.collate([samples[key] for key in wanted])), dataset.text)
    loader: DataLoader[Any] = DataLoader(
        _Seeded(dataset.data, seed),
        batch_sampler=_Endless(steps),
        num_workers=dataset.num_workers,
        collate_fn=dataset.collate,
        prefetch_factor=AHEAD,
    )
    for batch in loader:
        yield form.spread(_leaves(batch), dataset.text)


def repeated(batch: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same batch for ever."""
    return itertools.repeat(list(batch))


def made_by_step(make: Callable[[int], Any], form: Form, text: str, first_step: int) -> Iterator[list[Tensor]]:
    """Whole batches that the user's `make_batch(step)` makes."""
    whole = replace(form, rows=tuple(range(form.batch_size)))
    for step in itertools.count(first_step):
        yield whole.spread(_leaves(make(step)), text)


def _streamed(dataset: Dataset, form: Form, batch_size: int, first_step: int) -> Iterator[list[Tensor]]:
    """Every rank reads the whole stream and keeps its rows; a run that is taken up reads past what it has seen."""
    stream = itertools.islice(_forever(dataset), first_step * batch_size, None)
    rows = set(form.rows)
    while True:
        kept = [sample for row, sample in enumerate(itertools.islice(stream, batch_size)) if row in rows]
        yield form.spread(_leaves(dataset.collate(kept)), dataset.text)


def _forever(dataset: Dataset) -> Iterator[Any]:
    while True:
        is_empty = True
        for sample in dataset.data:
            is_empty = False
            yield sample
        if is_empty:
            raise InputError(f"{dataset.text}: the dataset has no samples")


def _leaves(batch: Any) -> list[Tensor]:
    """In the order in which a graph has its inputs: positional ones, then keywords as given."""
    return [leaf for leaf in torch_adapter.tree_leaves(batch) if isinstance(leaf, Tensor)]


class _Endless:
    """A batch sampler without an end or a length."""

    def __init__(self, steps: Iterator[list[tuple[int, int]]]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._steps


class _Seeded(Samples[Any]):
    """A dataset by (position, index), whose random choices depend on the position."""

    def __init__(self, data: Any, seed: int) -> None:
        self._data, self._seed = data, seed

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        seed = _seed(self._seed, "sample", position)
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        return self._data[index]
