"""Codecs: a vector as one message of bytes and back, and the feedback of what coding lost.

A message is one uint8 tensor, of the length that `ir.sync.message_bytes` states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autopar.ir.sync import INDEX_BYTES, SCALE_BYTES, SyncPolicy, kept_entries

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Codec(Protocol):
    """`decode(encode(x), like=x)` approximates the vector x, in its dtype and length."""

    def encode(self, vector: Tensor) -> Tensor: ...

    def decode(self, message: Tensor, like: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Cast:
    """Entries in another dtype; None: as they are."""

    dtype: torch.dtype | None

    def encode(self, vector: Tensor) -> Tensor:
        return vector.to(self.dtype or vector.dtype).contiguous().view(torch.uint8)

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        return message.view(self.dtype or like.dtype).to(like.dtype)


@dataclass(frozen=True)
class Fp8:
    """The largest magnitude becomes the largest 8-bit number; the scale comes first, as float32."""

    def encode(self, vector: Tensor) -> Tensor:
        largest = vector.abs().max().to(torch.float32)
        scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
        scaled = (vector / scale.to(vector.dtype)).clamp(-FP8_MAX, FP8_MAX)
        return torch.cat([scale.reshape(1).view(torch.uint8), scaled.to(FP8).view(torch.uint8)])

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        scale = message[:SCALE_BYTES].clone().view(torch.float32).to(like.dtype)
        return message[SCALE_BYTES:].clone().view(FP8).to(like.dtype) * scale


@dataclass(frozen=True)
class TopK:
    """The entries of largest magnitude, then their places as int32."""

    share: float

    def encode(self, vector: Tensor) -> Tensor:
        places = vector.abs().topk(kept_entries(self.share, vector.numel()), sorted=False).indices
        return torch.cat([vector[places].view(torch.uint8), places.to(torch.int32).view(torch.uint8)])

    def decode(self, message: Tensor, like: Tensor) -> Tensor:
        kept = message.numel() // (like.element_size() + INDEX_BYTES)
        split = kept * like.element_size()
        found = torch.zeros_like(like)
        found[message[split:].clone().view(torch.int32).long()] = message[:split].clone().view(like.dtype)
        return found


def codec_of(policy: SyncPolicy) -> Codec:
    """The codec of the policy's messages; power-sgd has none, for it sends no messages of its own."""
    if policy.compression == "fp8":
        return Fp8()
    if policy.compression == "top-k":
        return TopK(policy.share)
    return Cast(torch.bfloat16 if policy.compression == "bf16" else None)


class Feedback:
    """What coding has left out so far, which is added to the next vector (error feedback, Seide et al. 2014).

    After any number of steps, the sum of what was decoded plus `residual` is the sum of what was given.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.residual: Tensor | None = None

    def encode(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The message, and what a receiver will decode from it."""
        wanted = vector if self.residual is None else vector + self.residual
        message = self.codec.encode(wanted)
        decoded = self.codec.decode(message, wanted)
        self.residual = wanted - decoded
        return message, decoded
