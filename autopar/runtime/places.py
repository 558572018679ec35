"""Places outside of a device where its tensors may lie: memory of the host, or a file that is mapped into it.

The file has no name (it is unlinked when it is made), so that nothing is left of it however the process ends. Its room
is taken before it is used: a disk that is full says so at once, and not when the kernel writes pages back.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from typing import Protocol

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.units import format_bytes

OTHER = "name another directory with --offload-dir"


class Place(Protocol):
    """Somewhere outside of a device."""

    def take(self, num_bytes: int) -> Tensor:
        """So many bytes (at least one), as a CPU tensor of uint8. Raises InputError where there is no room."""

    def leave(self, tensor: Tensor) -> None:
        """Nothing will read this tensor for now: its pages need not stay in memory."""

    def release(self, tensor: Tensor) -> None:
        """Give back what `take` gave."""


class HostPlace:
    """Memory of the host; page-locked where a GPU copies from and to it."""

    def __init__(self, device: str) -> None:
        self._is_pinned = device != "cpu"

    def take(self, num_bytes: int) -> Tensor:
        """See `Place`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)

    def leave(self, tensor: Tensor) -> None:
        """See `Place`."""

    def release(self, tensor: Tensor) -> None:
        """See `Place`: it goes with its last reference."""


class DiskPlace:
    """A file in `directory`, mapped piece by piece; pieces that are given back are used again."""

    def __init__(self, directory: str) -> None:
        """`directory` "": where temporary files go. Raises InputError where no file can be made."""
        self._directory = directory or tempfile.gettempdir()
        try:
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115  closed with the process
        except OSError as error:
            raise InputError(f"cannot offload to {self._directory}: {error.strerror}; {OTHER}") from error
        self._size = 0
        self._maps: dict[int, mmap.mmap] = {}
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, num_bytes: int) -> Tensor:
        """See `Place`."""
        length = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        free = self._free.get(length)
        found = torch.frombuffer(free.pop() if free else self._grow(length), dtype=torch.uint8, count=length)
        return found[:num_bytes]

    def _grow(self, length: int) -> mmap.mmap:
        try:
            os.posix_fallocate(self._file.fileno(), self._size, length)
            made = mmap.mmap(self._file.fileno(), length, offset=self._size)
        except OSError as error:
            free = shutil.disk_usage(self._directory).free
            raise InputError(
                f"cannot offload to {self._directory}: {error.strerror}: {format_bytes(self._size)} are there, "
                f"{format_bytes(length)} more are needed, {format_bytes(free)} are free; {OTHER}"
            ) from error
        self._size += length
        self._maps[torch.frombuffer(made, dtype=torch.uint8).data_ptr()] = made
        return made

    def leave(self, tensor: Tensor) -> None:
        """See `Place`: the pages go to the kernel, which writes them."""
        self._maps[tensor.data_ptr()].madvise(mmap.MADV_DONTNEED)

    def release(self, tensor: Tensor) -> None:
        """See `Place`."""
        found = self._maps[tensor.data_ptr()]
        self._free.setdefault(len(found), []).append(found)


def make_place(name: str, device: str, directory: str) -> Place:
    """The place of `ir.offload.PLACES` called so."""
    return DiskPlace(directory) if name == "disk" else HostPlace(device)
