"""What this machine can measure: one window of every meter, and how far counter, integrated power and Zeus agree."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from autopar.meters import NodeMeter, Reading, ZeusMeter, unknown


@dataclass(frozen=True)
class MeterCheck:
    """Readings over the same window.

    Attributes:
        gpus, host, zeus: see `Reading`; `zeus` is None where it was not asked for.
        zeus_disagreement: Zeus's joules over those of `gpus`, less 1; None if not both are known.
    """

    gpus: Reading
    host: Reading
    zeus: Reading | None = None
    zeus_disagreement: float | None = None


def check_meters(
    window_s: float,
    *,
    with_zeus: bool = False,
    meter: NodeMeter | None = None,
    zeus: ZeusMeter | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> MeterCheck:
    """Read every meter over one window, whatever runs on the machine meanwhile.

    Args:
        meter, zeus: doubles.
    """
    second = (zeus or ZeusMeter()) if with_zeus else None
    with meter or NodeMeter() as opened:
        opened.start()
        if second is not None:
            second.start()
        sleep(window_s)
        other = None if second is None else second.stop()
        found = opened.stop()
    gpus = unknown("the meter has no GPUs", window_s, "gpu") if found.gpu is None else found.gpu
    return MeterCheck(gpus, found.host, other, _disagreement(gpus, other))


def _disagreement(own: Reading, other: Reading | None) -> float | None:
    if own.value_j is None or other is None or other.value_j is None:
        return None
    return other.value_j / own.value_j - 1
