"""The order of samples depends on step, seed and batch alone; every rank gets what it reads."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from autopar.errors import InputError
from autopar.runtime.feed import Feed, Form, Order, batches_of, made_by_step, open_dataset

BATCH, COUNT = 6, 20


class Noisy(Dataset[Any]):
    """Its samples are its indices and random numbers of three kinds."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        numbers = torch.tensor([index, random.random(), float(torch.rand(()))], dtype=torch.float64)
        return {"x": numbers, "y": torch.tensor(index)}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(
            [{"x": torch.full((3,), float(i), dtype=torch.float64), "y": torch.tensor(i)} for i in range(COUNT)]
        )


def form(rows: tuple[int, ...] = tuple(range(BATCH))) -> Form:
    return Form(((BATCH, 3), (BATCH,)), (torch.float64, torch.int64), (0, 0), (torch.empty(0), torch.empty(0)), rows)


def take(found: Any, rows: tuple[int, ...], first_step: int, count: int, seed: int = 0) -> list[list[torch.Tensor]]:
    return list(itertools.islice(batches_of(open_dataset(found, "m.py"), form(rows), BATCH, seed, first_step), count))


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(COUNT, BATCH, seed=3)
    steps = [index for step in range(10) for _, index in order.samples(step, range(BATCH))]
    epochs = [steps[i : i + COUNT] for i in range(0, 60, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Order(COUNT, BATCH, seed=4).samples(0, range(BATCH)) != order.samples(0, range(BATCH))


@pytest.mark.parametrize("made", [Noisy, Stream, lambda: DataLoader(Noisy(), shuffle=False)])
def test_a_run_taken_up_sees_what_it_would_have_seen(made: Any) -> None:
    whole = tuple(range(BATCH))
    assert same(take(made(), whole, 0, 9)[5:], take(made(), whole, 5, 4))


@pytest.mark.parametrize("made", [Noisy, Stream])
def test_ranks_share_a_batch(made: Any) -> None:
    whole = take(made(), tuple(range(BATCH)), 2, 3)
    parts = [take(made(), rows, 2, 3) for rows in ((0, 1), (2, 5), (3, 4))]
    for step, batch in enumerate(whole):
        for tensor, expected in enumerate(batch):
            assert torch.equal(sum(part[step][tensor] for part in parts), expected)  # type: ignore[arg-type]
    assert [float(x.abs().sum()) for x in take(made(), (), 0, 1)[0]] == [0, 0]


def test_loader_processes_make_the_same_batches() -> None:
    alone = take(DataLoader(Noisy(), shuffle=True), (0, 3), 1, 4)
    assert same(alone, take(DataLoader(Noisy(), shuffle=True, num_workers=2), (0, 3), 1, 4))


def test_batches_by_step_are_whole() -> None:
    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((BATCH, 3), float(step), dtype=torch.float64), torch.arange(BATCH)

    found = list(itertools.islice(made_by_step(make, form((1,)), "m.py", 7), 2))
    assert [float(batch[0].mean()) for batch in found] == [7, 8]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "must return a Dataset, a sequence or a DataLoader, not int"),
        (DataLoader(Noisy(), sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)), "WeightedRandomSampler"),
    ],
)
def test_other_datasets_are_refused(found: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(found, "m.py")


@pytest.mark.parametrize(
    ("found", "message"),
    [([], "has no samples"), ([(torch.zeros(3), 1)] * 4, "float32"), ([torch.zeros(3)] * 4, "has 1 tensors")],
)
def test_samples_of_another_form_are_refused(found: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        take(found, (0, 1), 0, 1)


def test_a_feed_hands_over_what_the_dataset_raises() -> None:
    def broken() -> Any:
        yield [torch.zeros(1)]
        raise KeyError("sample 7")

    feed = Feed(broken())
    assert torch.equal(next(feed)[0], torch.zeros(1))
    with pytest.raises(KeyError, match="sample 7"):
        next(feed)
    feed.close()


def test_a_slow_dataset_is_told() -> None:
    def slow() -> Any:
        while True:
            time.sleep(0.02)
            yield [torch.zeros(1)]

    feed = Feed(slow(), ahead=0)
    for _ in range(3):
        next(feed)
    (remark,) = feed.remarks(total_s=0.08)
    assert remark.startswith("the input binds: ")
    assert feed.remarks(total_s=1000.0) == ()
