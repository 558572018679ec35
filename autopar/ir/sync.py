"""Ways to keep replicas of one model in step: what is exchanged, how often, how stale a gradient may be.

A policy is data with a text form, e.g. `all-reduce+bf16`, `ps-async+top-k=0.01` or `local=8`:

| policy       | workers exchange                                              | staleness of W like workers    |
|--------------|---------------------------------------------------------------|--------------------------------|
| `all-reduce` | the mean of their gradients, every step                       | 0                              |
| `ps-sync`    | gradients with a server, which updates when all have come     | 0                              |
| `ps-async`   | gradients with a server, which updates at each                | W - 1 updates by others        |
| `local=H`    | the mean of their parameters, every H steps of their own SGD  | 0; replicas H - 1 steps apart  |

| compression   | of the gradients that workers send                                                         |
|---------------|--------------------------------------------------------------------------------------------|
| `bf16`        | rounded to bfloat16                                                                        |
| `fp8`         | to 8-bit floats (e4m3) with one scale per message                                          |
| `top-k=SHARE` | that share of the entries, those of largest magnitude, with their places                   |
| `power-sgd=R` | each matrix as a product of rank R (Vogels et al. 2019), by torch's hook; all-reduce alone |

`exchange` is the one statement of how many bytes a policy moves: the runtime is tested against it, the cost model
prices it. A server is a process of its own. Compression changes the mathematics, so no plan contains it unasked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.errors import InputError
from autopar.ir.measured import energy_of
from autopar.ir.quantity import Quantity

POLICIES = ("all-reduce", "ps-sync", "ps-async", "local")
COMPRESSIONS = ("none", "bf16", "fp8", "top-k", "power-sgd")
DEFAULT_SHARE = 0.01
DEFAULT_RANK = 4
INDEX_BYTES = 4
"""Of the place of an entry that top-k keeps."""
SCALE_BYTES = 4
"""Of the scale of an 8-bit message."""
LEAST_RATE = 2
"""torch's PowerSGD leaves matrices whole whose factors are not this many times smaller (its default)."""


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """See the module docstring.

    Attributes:
        local_steps: H of `local`; 1 for the others.
        share: of the entries that top-k keeps, in (0, 1].
        rank: of PowerSGD, >= 1.

    Raises:
        InputError: the parts do not go together.
    """

    kind: str
    local_steps: int = 1
    compression: str = "none"
    share: float = DEFAULT_SHARE
    rank: int = DEFAULT_RANK

    def __post_init__(self) -> None:
        if self.kind not in POLICIES:
            raise InputError(f"unknown policy {self.kind!r}; one of {', '.join(POLICIES)}")
        if self.compression not in COMPRESSIONS:
            raise InputError(f"unknown compression {self.compression!r}; one of {', '.join(COMPRESSIONS)}")
        if self.local_steps < 1:
            raise InputError(f"local steps must be at least 1, got {self.local_steps}")
        if not 0 < self.share <= 1:
            raise InputError(f"top-k keeps a share above 0 and at most 1, got {self.share:g}")
        if self.rank < 1:
            raise InputError(f"the rank of power-sgd must be at least 1, got {self.rank}")
        if self.kind == "local" and self.compression != "none":
            raise InputError("local steps exchange parameters, and only gradients are compressed: leave out the '+'")
        if self.kind.startswith("ps") and self.compression == "power-sgd":
            raise InputError("power-sgd sums its factors over the workers: it needs all-reduce")

    def __str__(self) -> str:
        text = f"local={self.local_steps}" if self.kind == "local" else self.kind
        detail = {"top-k": f"={self.share:g}", "power-sgd": f"={self.rank}"}.get(self.compression, "")
        return text if self.compression == "none" else f"{text}+{self.compression}{detail}"

    @property
    def has_server(self) -> bool:
        return self.kind.startswith("ps")

    def num_processes(self, num_workers: int) -> int:
        """Workers, and the server where there is one."""
        return num_workers + self.has_server

    def staleness(self, num_workers: int) -> float:
        """Updates by others between reading parameters and applying the gradient, mean over like workers."""
        return float(num_workers - 1) if self.kind == "ps-async" else 0.0


def parse_policy(text: str) -> SyncPolicy:
    """Inverse of `str(policy)`. Raises InputError."""
    head, plus, tail = text.strip().partition("+")
    kind, equals, count = head.partition("=")
    if equals and kind != "local":
        raise InputError(f"{text}: only local takes a number, e.g. local=8")
    fields: dict[str, Any] = {}
    if equals:
        fields["local_steps"] = _number(text, count, whole=True)
    compression, equals, detail = tail.partition("=")
    if equals:
        name = {"top-k": "share", "power-sgd": "rank"}.get(compression)
        if name is None:
            raise InputError(f"{text}: {compression or 'nothing'} takes no number")
        fields[name] = _number(text, detail, whole=name == "rank")
    return SyncPolicy(kind, compression=compression if plus else "none", **fields)


def _number(text: str, part: str, *, whole: bool) -> float:
    try:
        return int(part) if whole else float(part)
    except ValueError:
        raise InputError(f"{text}: {part!r} is not a {'whole number' if whole else 'number'}") from None


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message of one worker.

    Attributes:
        kind: a collective among the workers, with bytes as in `cost.collective`; or `push` and `pull`, to and from the
            server.
    """

    kind: str
    num_bytes: int

    def handed_bytes(self, num_workers: int) -> float:
        """What the worker itself hands over: its part of what all gather, nothing of what it pulls."""
        if self.kind == "pull":
            return 0.0
        return self.num_bytes / num_workers if self.kind == "all_gather" else float(self.num_bytes)


def exchange(
    policy: SyncPolicy, shapes: Sequence[tuple[int, ...]], item_bytes: int, num_workers: int
) -> tuple[Transfer, ...]:
    """What one worker hands over in one exchange, in order; nothing where it is alone and has no server.

    Args:
        shapes: of the parameters, which form one message.
        item_bytes: of one entry of parameters and gradients.
    """
    count = sum(math.prod(shape) for shape in shapes)
    if policy.has_server:
        return (Transfer("push", message_bytes(policy, count, item_bytes)), Transfer("pull", count * item_bytes))
    if num_workers == 1:
        return ()
    if policy.compression == "fp8":
        part = num_workers * (-(-count // num_workers) + SCALE_BYTES)
        return (Transfer("all_to_all", part), Transfer("all_gather", part))
    if policy.compression == "top-k":
        return (Transfer("all_gather", num_workers * message_bytes(policy, count, item_bytes)),)
    if policy.compression == "power-sgd":
        return tuple(Transfer("all_reduce", n * item_bytes) for n in _factors(shapes, policy.rank))
    return (Transfer("all_reduce", message_bytes(policy, count, item_bytes)),)


def message_bytes(policy: SyncPolicy, count: int, item_bytes: int) -> int:
    """Of one encoded vector of so many entries."""
    if policy.compression == "bf16":
        return 2 * count
    if policy.compression == "fp8":
        return count + SCALE_BYTES
    if policy.compression == "top-k":
        return kept_entries(policy.share, count) * (item_bytes + INDEX_BYTES)
    return count * item_bytes


def kept_entries(share: float, count: int) -> int:
    """Entries of a vector that top-k keeps: at least one."""
    return min(count, max(1, math.ceil(share * count)))


def _factors(shapes: Sequence[tuple[int, ...]], rank: int) -> tuple[int, int, int]:
    """Entries that stay whole, and of left and right factors, as torch's `powerSGD_hook` divides them."""
    whole = left = right = 0
    for shape in shapes:
        rows, size = (shape[0] if shape else 1), math.prod(shape)
        columns = size // rows if rows else 0
        own = min(rows, columns, rank)
        if (rows + columns) * own * LEAST_RATE < size:
            left, right = left + rows * own, right + columns * own
        else:
            whole += size
    return whole, left, right


@dataclass(frozen=True)
class SyncPrice:
    """What a policy should cost per step of the global batch, all processes together.

    Attributes:
        compute_s, exchange_s: parts of a step as one worker sees it; what waiting adds is in `step_time_s` alone.
        dynamic_j: energy above blocked power.
        fixed_w: blocked power of every process and power of the hosts.
        sent_bytes: that one worker hands over, per step; of an fp8 sum its part of the mean too.
        staleness: see `SyncPolicy.staleness`.
    """

    policy: SyncPolicy
    num_workers: int
    step_time_s: Quantity
    energy_j: Quantity
    average_power_w: Quantity
    compute_s: float
    exchange_s: float
    dynamic_j: float
    fixed_w: float
    sent_bytes: float
    staleness: float

    def energy_at(self, time_s: Quantity) -> Quantity:
        """Modelled energy of a step that took this long."""
        wide = self.energy_j.high / self.energy_j.value - 1
        return energy_of(self.dynamic_j, self.fixed_w, time_s, wide)


@dataclass(frozen=True)
class SyncRun:
    """What a run of a policy on local processes measured.

    Attributes:
        step_time: of one step of the global batch.
        energy: of the average step over all that the meters cover; None where nothing can be read.
        losses: of every step, before it, mean over the workers.
        staleness: how many gradients of the timed steps were so many updates late.
    """

    policy: SyncPolicy
    num_workers: int
    step_time: Quantity
    energy: Quantity | None
    losses: tuple[float, ...]
    staleness: Mapping[int, int]
    notes: tuple[str, ...]

    @property
    def mean_staleness(self) -> float:
        total = sum(self.staleness.values())
        return sum(late * count for late, count in self.staleness.items()) / total if total else 0.0
