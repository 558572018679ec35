"""What a profile store holds: measured ops with what they are looked up by, and the numbers of a device."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class MeasuredNumber:
    """One number of a device file, measured. `path` as in the file, e.g. `memory.bandwidth_bytes_per_s`."""

    path: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class MeasuredLine:
    """Time of a transfer or an update by size: `latency_s + bytes * s_per_byte`.

    Attributes:
        kind: a collective, `send`, or `update:` with the optimizer's name. Bytes of a collective as in
            `cost.collective`, of a send those sent, of an update those of the parameter.
        ranks: members of the group; 1 for updates.
        error: median relative error of the line at the sizes measured.
    """

    kind: str
    ranks: int
    latency_s: float
    s_per_byte: float
    error: float

    def __post_init__(self) -> None:
        numbers = (self.latency_s, self.s_per_byte, self.error)
        if not all(0 <= number < math.inf for number in numbers) or self.ranks < 1:
            raise ValueError(f"times of {self.kind} must be finite and not negative, found {numbers}")


@dataclass(frozen=True)
class DeviceProfile:
    """One device, measured: it replaces what the built-in file says, number by number.

    Attributes:
        provenance: as in `OpProfile`.
    """

    device: str
    numbers: tuple[MeasuredNumber, ...]
    lines: tuple[MeasuredLine, ...]
    provenance: Mapping[str, str]
