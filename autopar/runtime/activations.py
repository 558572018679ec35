"""Activations that leave the device when forward has made them, and come back ahead of their backward.

What autograd saves inside `offloading` is kept as a note of where it lies (by `torch.autograd.graph`'s hooks for saved
tensors). Memory moves by storage, so that what several ops save, or views of it, moves once. Parameters, buffers and
whatever else stays on the device anyway is left alone, and so are small storages.

On a GPU copies to and from the host run on a stream of their own, at most WINDOW_BYTES of each at a time: forward waits
for the oldest copy where more would be under way; backward asks for one storage and starts those that were saved before
it. Anywhere else a copy is done when it has been asked for.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from autopar.ir.offload import LEAST_BYTES, WINDOW_BYTES
from autopar.runtime.places import HostPlace, Place
from autopar.torch_adapter import StorageWatch, version_of


class Piece:
    """One storage that has left."""

    def __init__(self, home: Tensor, place: Place) -> None:
        self.home, self.num_bytes = home, home.numel()
        self.back: Tensor | None = None
        self.is_back: torch.cuda.Event | None = None
        self.give_back = weakref.finalize(self, place.release, home)


Order: TypeAlias = list["weakref.ref[Piece]"]
"""Pieces of a microbatch, as they left."""


@dataclass(frozen=True)
class Away:
    """A saved tensor whose storage has left."""

    piece: Piece
    road: Road
    order: Order
    index: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        """The tensor, back on the device."""
        raw = self.road.bring(self.piece, self.order[: self.index])
        with torch.no_grad():
            found = torch.empty(0, dtype=self.dtype, device=raw.device)
            return found.set_(raw.untyped_storage(), self.offset, self.size, self.stride)


class Road:
    """Moves storages of one device to one place and back."""

    def __init__(self, place: Place, device: str) -> None:
        self._place, self._device = place, device
        make: Callable[[str], torch.cuda.Stream] = torch.cuda.Stream
        self._stream = make(device) if device != "cpu" and isinstance(place, HostPlace) else None
        self._leaving: deque[tuple[torch.cuda.Event, int]] = deque()

    def send(self, storage: torch.UntypedStorage) -> Piece:
        """Copy a storage out."""
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        piece = Piece(self._place.take(raw.numel()), self._place)
        if self._stream is None:
            piece.home.copy_(raw)
            self._place.leave(piece.home)
        else:
            self._send_beside(raw, piece, self._stream)
        return piece

    def _send_beside(self, raw: Tensor, piece: Piece, stream: torch.cuda.Stream) -> None:
        while self._leaving and sum(size for _, size in self._leaving) + raw.numel() > WINDOW_BYTES:
            self._leaving.popleft()[0].synchronize()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            piece.home.copy_(raw, non_blocking=True)
            raw.record_stream(stream)
            self._leaving.append((stream.record_event(), raw.numel()))

    def bring(self, piece: Piece, before: Order) -> Tensor:
        """The bytes of a piece on the device; those that left `before` it start too, as far as the window goes."""
        self._start(piece)
        room = WINDOW_BYTES - piece.num_bytes
        for ref in reversed(before) if self._stream is not None else ():
            other = ref()
            if other is None:
                continue
            room -= other.num_bytes
            if room < 0:
                break
            self._start(other)
        assert piece.back is not None
        if piece.is_back is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(piece.is_back)
            piece.back.record_stream(current)
        return piece.back

    def _start(self, piece: Piece) -> None:
        if piece.back is not None:
            return
        if self._stream is None:
            piece.back = torch.empty(piece.num_bytes, dtype=torch.uint8, device=self._device)
            piece.back.copy_(piece.home)
        else:
            with torch.cuda.stream(self._stream):
                piece.back = torch.empty(piece.num_bytes, dtype=torch.uint8, device=self._device)
                piece.back.copy_(piece.home, non_blocking=True)
                piece.is_back = self._stream.record_event()
        piece.give_back()
        del piece.home


class OffloadedActivations:
    """What the stages of one rank save for backward, elsewhere."""

    def __init__(self, place: Place, device: str, least_bytes: int = LEAST_BYTES) -> None:
        self._road = Road(place, device)
        self._order: Order = []
        self._least_bytes = least_bytes
        self._staying: set[int] = set()
        self._sent: dict[tuple[int, int], tuple[StorageWatch, weakref.ref[Piece], int]] = {}

    def begin(self, staying: Iterable[Tensor]) -> None:
        """A microbatch begins; `staying` are tensors that lie on the device until its backward in any case."""
        self._order = []
        self._staying = {tensor.untyped_storage().data_ptr() for tensor in staying}
        self._sent = {}

    @contextmanager
    def offloading(self) -> Iterator[None]:
        """Run a piece of forward whose saved tensors leave."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
            yield

    def pack(self, tensor: Tensor) -> Tensor | Away:
        """A note of where the tensor lies, or the tensor if it stays."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._least_bytes or storage.data_ptr() in self._staying:
            return tensor
        key = storage.data_ptr(), version_of(tensor)
        watch, ref, index = self._sent.get(key, (None, None, 0))
        piece = None if ref is None or watch is None or watch.is_gone() else ref()
        if piece is None:
            with torch.no_grad():
                piece, index = self._road.send(storage), len(self._order)
            self._order.append(weakref.ref(piece))
            self._sent[key] = StorageWatch(storage), weakref.ref(piece), index
        where = tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return Away(piece, self._road, self._order, index, *where)


def unpack(packed: Tensor | Away) -> Tensor:
    """Inverse of `OffloadedActivations.pack`."""
    return packed if isinstance(packed, Tensor) else packed.restore()
