"""TensorMeta: shape and dtype of a tensor, without data and without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

BYTES_BY_DTYPE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape (dims) and dtype name (torch spelling without the `torch.` prefix)."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_BY_DTYPE:
            raise ValueError(f"unknown dtype {self.dtype!r}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"negative size in {self.shape}")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * BYTES_BY_DTYPE[self.dtype]

    @property
    def is_floating(self) -> bool:
        return "float" in self.dtype or "complex" in self.dtype

    def with_shape(self, shape: tuple[int, ...]) -> TensorMeta:
        return TensorMeta(shape, self.dtype)
