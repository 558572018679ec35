"""OpProfile: one measured row of the profile store, and what it is looked up by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.ir.graph import Arg
from autopar.ir.tensor import TensorMeta


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What was run: an op on local shapes on a device.

    Attributes:
        target: `aten.linear.default`.
        inputs: local shapes and dtypes of the tensors read, in order.
        args, kwargs: constants of the call; `Ref`s stand for `inputs`.
        device: kebab-case device name, as in `costmodels/`.
    """

    target: str
    inputs: tuple[TensorMeta, ...]
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    device: str


@dataclass(frozen=True, slots=True)
class OpProfile:
    """One measurement.

    Attributes:
        forward_s, backward_s: medians; 0 backward for an op without gradient.
        spread: (90th - 10th percentile) / median of forward.
        peak_bytes: memory allocated at the worst moment above the inputs, or None if the device cannot tell.
        energy_j: of forward and backward, above blocked power, or None if there is no counter.
        repeats: measurements taken.
        provenance: machine, date, torch version, thread count.
    """

    key: ProfileKey
    forward_s: float
    backward_s: float
    spread: float
    peak_bytes: int | None
    energy_j: float | None
    repeats: int
    provenance: Mapping[str, str]
