"""Files of tensors in the safetensors format: a length, a JSON header, the bytes of every tensor. No code.

Source of the format: https://huggingface.co/docs/safetensors (8 bytes of header length, little-endian; entries
`{"dtype", "shape", "data_offsets"}` by name; offsets count from the end of the header and leave no holes).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from autopar.errors import InputError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""The format's own bound."""
HEADER_TEXT = "__metadata__"
"""Entry of the header that holds text by name, not a tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `begin` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its form, and how to get it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * torch.empty((), dtype=DTYPES[dtype]).element_size()


def dtype_name(dtype: torch.dtype) -> str:
    """`F32` and so on. Raises InputError for a dtype that the format has no name for."""
    if dtype not in NAMES:
        raise InputError(f"tensors of {dtype} cannot be kept in a checkpoint; it knows {', '.join(DTYPES)}")
    return NAMES[dtype]


def write_tensors(
    path: Path, tensors: Mapping[str, Planned], text: Mapping[str, str] | None = None
) -> dict[str, tuple[Entry, int]]:
    """Write the tensors, one in memory at a time, and make the file durable; entry and CRC-32 by name."""
    wide_first = sorted(tensors, key=lambda name: (-torch.empty((), dtype=tensors[name].dtype).element_size(), name))
    header: dict[str, Any] = {HEADER_TEXT: {"format": "pt", **(text or {})}}
    position = 0
    for name in wide_first:
        dtype, shape = dtype_name(tensors[name].dtype), tuple(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position]}
        position += size_of(dtype, shape)
        header[name]["data_offsets"].append(position)
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % LENGTH_BYTES)  # so that tensors start at a multiple of their width
    start = LENGTH_BYTES + len(content)
    written: dict[str, tuple[Entry, int]] = {}
    with path.open("wb") as file:
        file.write(len(content).to_bytes(LENGTH_BYTES, "little"))
        file.write(content)
        for name in wide_first:
            begin, end = header[name]["data_offsets"]
            checksum = _write_tensor(file, tensors[name])
            entry = Entry(header[name]["dtype"], tuple(tensors[name].shape), start + begin, end - begin)
            written[name] = entry, checksum
        file.flush()
        os.fsync(file.fileno())
    return written


def _write_tensor(file: IO[bytes], planned: Planned) -> int:
    tensor = planned.make().detach().to("cpu", planned.dtype).contiguous()
    assert tuple(tensor.shape) == tuple(planned.shape), (tensor.shape, planned.shape)
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    file.write(data)
    return zlib.crc32(data)


class TensorFile:
    """A file of tensors, mapped into memory. Every message of its errors starts with its path."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises InputError if it is missing or not in the format."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size_bytes = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self.size_bytes else None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        self.entries, self.text = self._read_header()

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        if self._map is None or self.size_bytes < LENGTH_BYTES:
            raise InputError(f"{self.path}: not a safetensors file: it has {self.size_bytes} bytes")
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        start = LENGTH_BYTES + length
        if length > MOST_HEADER_BYTES or start > self.size_bytes:
            raise InputError(f"{self.path}: not a safetensors file, or truncated: header of {length} bytes")
        try:
            header = json.loads(self._map[LENGTH_BYTES:start].decode("utf-8"))
            text = {str(key): str(value) for key, value in header.pop(HEADER_TEXT, {}).items()}
            entries = {str(name): _entry(found, start) for name, found in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{self.path}: not a safetensors file: bad header: {error}") from error
        for name, entry in entries.items():
            if entry.begin < start or entry.begin + entry.size_bytes > self.size_bytes:
                raise InputError(f"{self.path}: truncated: {name} ends past the end of the file")
        return entries, text

    def read(self, entry: Entry, checksum: int | None = None) -> Tensor:
        """One tensor, sharing the mapped memory.

        Raises:
            InputError: the entry lies outside the file, or its CRC-32 is another.
        """
        end = entry.begin + entry.size_bytes
        if self._map is None or end > self.size_bytes:
            raise InputError(f"{self.path}: truncated: it has {self.size_bytes} bytes, a tensor ends at {end}")
        dtype = DTYPES[entry.dtype]
        if not entry.size_bytes:
            return torch.empty(entry.shape, dtype=dtype)
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.size_bytes, offset=entry.begin)
        if checksum is not None and zlib.crc32(data.numpy().data) != checksum:
            raise InputError(f"{self.path}: damaged: the bytes {entry.begin} to {end} have another checksum")
        if entry.begin % torch.empty((), dtype=dtype).element_size():
            data = data.clone()
        return data.view(dtype).reshape(entry.shape)


def _entry(found: Mapping[str, Any], start: int) -> Entry:
    dtype, shape = str(found["dtype"]), tuple(int(size) for size in found["shape"])
    begin, end = (int(offset) for offset in found["data_offsets"])
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if any(size < 0 for size in shape) or begin < 0 or end - begin != size_of(dtype, shape):
        raise ValueError(f"{end - begin} bytes for shape {shape} of {dtype}")
    return Entry(dtype, shape, start + begin, end - begin)
