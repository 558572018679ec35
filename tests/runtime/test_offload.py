"""Where offloaded tensors lie, and what autograd gets back of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.ir.offload import Offload
from autopar.ir.run import RunSettings
from autopar.runtime.activations import Away, OffloadedActivations
from autopar.runtime.places import DiskPlace, HostPlace, Place

PLACES: list[Callable[[Path], Place]] = [lambda _: HostPlace("cpu"), lambda path: DiskPlace(str(path))]


def full(_descriptor: int, _offset: int, _length: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("make", PLACES)
def test_a_place_gives_back_what_was_put_there(make: Callable[[Path], Place], tmp_path: Path) -> None:
    place = make(tmp_path)
    first, second = place.take(10_000), place.take(10_000)
    first.fill_(1)
    second.fill_(2)
    place.leave(first)
    place.leave(second)
    assert set(first.tolist()) == {1}
    assert set(second.tolist()) == {2}


def test_the_file_has_no_name_and_its_pieces_are_used_again(tmp_path: Path) -> None:
    place = DiskPlace(str(tmp_path))
    first = place.take(10_000)
    address = first.data_ptr()
    assert list(tmp_path.iterdir()) == []
    place.release(first)
    assert place.take(9_999).data_ptr() == address
    assert place.take(9_999).data_ptr() != address


def test_a_full_disk_and_a_directory_that_is_none_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"No such file.*--offload-dir"):
        DiskPlace(str(tmp_path / "missing"))
    place = DiskPlace(str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"No space left on device: 0 B are there, 1 MiB more are needed.*free"):
        place.take(2**20)


def loss_of(x: Tensor, weight: Tensor) -> Tensor:
    """Saves `hidden` thrice: by itself, as a view and transposed."""
    hidden = (x @ weight).tanh()
    whole = (hidden @ weight).sin() * hidden.view(-1, 2, 8).flatten(1)
    scaled = whole.exp()
    return (scaled * scaled.T.contiguous().T).sum() + (hidden.T * 3.0).square().sum()


@pytest.mark.parametrize("make", PLACES)
def test_gradients_are_those_of_what_stays(make: Callable[[Path], Place], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 16), torch.randn(16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(x, weight), weight)
    away = OffloadedActivations(make(tmp_path), "cpu", least_bytes=1)
    away.begin([x, weight])
    with away.offloading():
        loss = loss_of(x, weight)
    (found,) = torch.autograd.grad(loss, weight)
    assert torch.equal(found, expected)


class Counting(HostPlace):
    """Counts what is there."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.taken: list[int] = []
        self.released = 0

    def take(self, num_bytes: int) -> Tensor:
        self.taken.append(num_bytes)
        return super().take(num_bytes)

    def release(self, tensor: Tensor) -> None:
        self.released += 1


def test_memory_moves_once_small_and_staying_memory_not_at_all_and_all_is_given_back() -> None:
    place = Counting()
    away = OffloadedActivations(place, "cpu", least_bytes=256)
    kept, large, small = torch.randn(64), torch.randn(64, 2), torch.randn(4)
    away.begin([kept])
    packed: list[Any] = [away.pack(t) for t in (large, large.T, large[3:], kept, kept[1:], small)]
    assert [isinstance(one, Away) for one in packed] == [True] * 3 + [False] * 3
    assert place.taken == [large.numel() * 4]
    before = [large.clone(), large.T.clone(), large[3:].clone()]
    large.add_(1.0)
    assert isinstance(away.pack(large), Away)
    assert len(place.taken) == 2
    assert [torch.equal(one.restore(), tensor) for one, tensor in zip(packed[:3], before, strict=True)] == [True] * 3
    assert packed[0].restore().untyped_storage().data_ptr() == packed[2].restore().untyped_storage().data_ptr()
    packed.clear()
    assert place.released == 2


def test_settings_of_a_run_are_held_against_what_the_plan_offloads() -> None:
    RunSettings(offload_dir="x").check_offload(Offload("disk"))
    with pytest.raises(InputError, match="offloads nothing to disk"):
        RunSettings(offload_dir="x").check_offload(Offload("host", "host"))
    with pytest.raises(InputError, match="--compile"):
        RunSettings(compile="inductor").check_offload(Offload(activations="host"))
