"""Which device file a published name of a GPU means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autopar.cost.device import DeviceSpec
from autopar.cost.hardware import load_cluster
from autopar.errors import InputError

_START = r"(?<![a-wyz0-9])"
_BOARDS = (
    (r"gb?200\b", "b200-sxm-180gb"),
    (r"b200\b|blackwell", "b200-sxm-180gb"),
    (r"h200\b", "h200-sxm-141gb"),
    (r"h100\b.*(pcie|nvl\b)", "h100-pcie-80gb"),
    (r"h100\b", "h100-sxm-80gb h100-sxm-96gb"),
    (r"a100\b.*pcie", "a100-pcie-80gb"),
    (r"a100\b", "a100-sxm-80gb a100-sxm-40gb"),
    (r"v100\b.*(dgx-?2\b|sxm3)", "v100-sxm3-32gb"),
    (r"v100\b.*pcie", "v100-pcie-32gb"),
    (r"v100\b", "v100-sxm2-32gb"),
    (r"mi300x\b", "mi300x"),
    (r"a40\b", "a40"),
    (r"l40s\b", "l40s"),
    (r"l4\b", "l4"),
    (r"4090\b", "rtx-4090"),
    (r"rtx ?-?6000\b(?!.*ada)", "rtx-6000"),
    (r"p100\b", "p100-pcie-16gb"),
    (r"k40\b", "k40"),
    (r"k20\b", "k20"),
)
"""Name (pattern, in lower case) to device files; the first file is meant where no memory size is stated."""
_EARLY_A100 = r"\b2020\b"
"""The A100 of that year had 40 GB."""
CLOSE = 0.1
"""Relative difference in memory that naming explains (GB, GiB, what the driver keeps)."""


@dataclass(frozen=True)
class Board:
    """A device file, and what replaces its memory.

    Attributes:
        memory_bytes: usable, where the board has another size than the file; else None.
        assumed: what the text does not say.
    """

    spec: DeviceSpec
    memory_bytes: int | None = None
    assumed: str = ""


def find_board(hardware: str, memory_gb: float | None) -> Board:
    """The device file of a published name such as `A100-80GB SXM`; `memory_gb` is the stated size, if any.

    Raises:
        InputError: there is no cost model of that GPU.
    """
    low = hardware.casefold()
    names = next((files.split() for regex, files in _BOARDS if re.search(_START + f"({regex})", low)), None)
    if names is None:
        raise InputError(f"no cost model of the GPU {hardware!r} (see 'autopar gpus')")
    specs = [load_cluster(name, 1).spec for name in names]
    stated = memory_gb if memory_gb is not None else _size_in(low)
    if stated is None and names[0].startswith("a100-sxm") and re.search(_EARLY_A100, low):
        stated = 40.0
    if stated is None:
        assumed = f"{specs[0].name} for {hardware!r}, which states no memory size" if len(specs) > 1 else ""
        return Board(specs[0], assumed=assumed)
    nearest = min(specs, key=lambda spec: abs(spec.capacity_bytes - stated * 1e9))
    if abs(nearest.capacity_bytes / (stated * 1e9) - 1) <= CLOSE:
        return Board(nearest)
    return Board(nearest, max(1, int(stated * 1e9) - nearest.reserve_bytes))


def _size_in(text: str) -> float | None:
    """`80gb` in a name; not a rate."""
    match = re.search(r"([0-9]{1,3})\s*gi?b\b(?!\s*/|ps)", text)
    return float(match[1]) if match else None
